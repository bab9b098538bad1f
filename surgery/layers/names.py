"""Layer numbers in a config's names of modules (`model.layers.3.mlp`), carried along."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from surgery.anatomy import OTHER_TOWERS, Anatomy
from surgery.errors import PlanError


def rename_modules(config: dict[str, Any], anatomy: Anatomy, sources: Sequence[int]) -> None:
    """Change, in place, the names of layers in `quantization_config` and `factored`.

    Raises:
        PlanError: a pattern of its names numbers layers.
    """
    quantisation = config.get("quantization_config")
    if isinstance(quantisation, dict):
        config["quantization_config"] = _renamed(quantisation, _Names(anatomy, sources))
    factored = config.get("factored")
    if isinstance(factored, dict):
        names = _Names(anatomy, sources)
        config["factored"] = {
            new: told for name, told in factored.items() for new in names.of(name)
        }


class _Names:
    """The new names of a module, by its old name."""

    def __init__(self, anatomy: Anatomy, sources: Sequence[int]) -> None:
        last = re.escape(anatomy.stack.prefix.split(".")[-1])
        self._plain = re.compile(rf"^((?:.*\.)?{last}\.)(\d+)(\..*|)$")
        self._pattern = re.compile(rf"{last}\\*\.\D{{0,3}}\d")
        self._layers = anatomy.layers
        self._sources = sources

    def of(self, name: str) -> Iterator[str]:
        match = self._plain.match(name)
        pattern = name.replace("[0-9]", "")  # any layer at all
        if OTHER_TOWERS.search(name) or (match is None and not self._pattern.search(pattern)):
            yield name
        elif match is None or any(sign in match[3] for sign in "\\*[(|^$+?"):
            fact = f"has the pattern {name!r}, which numbers layers"
            raise PlanError("config.json, quantization_config", fact, "write its names out")
        else:
            for number in self._new(int(match[2])):
                yield f"{match[1]}{number}{match[3]}"

    def _new(self, number: int) -> list[int]:
        if number >= self._layers:  # a predictor behind the model's own layers
            return [number + len(self._sources) - self._layers]
        return [i for i, source in enumerate(self._sources) if source == number]


def _renamed(value: Any, names: _Names) -> Any:  # noqa: ANN401 - any JSON
    if isinstance(value, dict):
        return {
            new: _renamed(inner, names) for key, inner in value.items() for new in names.of(key)
        }
    if isinstance(value, list):
        flat = ([*names.of(v)] if isinstance(v, str) else [_renamed(v, names)] for v in value)
        return [entry for entries in flat for entry in entries]
    return value
