"""A step's values as words of a command line, the names of other steps as their outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.writing import resolved
from surgery.errors import RecipeError
from surgery.recipe.reader import Document

MANAGED = ("output", "dry-run", "json", "force")  # a pipeline has them for all of its steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step as it is written.

    Attributes:
        words: of the command, such as ("merge", "ties").
        command: typer's own object.
        given: per option as written its value.
        writes: it makes a checkpoint; else it measures.
        uses: the steps whose outputs stand among the values.
    """

    name: str
    words: tuple[str, ...]
    command: Any
    given: Mapping[str, Any]
    writes: bool
    keep: bool
    uses: tuple[str, ...]
    document: Document

    def place(self, *path: str) -> str:
        """Tell where something of the step is written."""
        return self.document.place("steps", self.name, *path)


def flag_of(parameter: Any) -> str:  # noqa: ANN401 - typer's own
    """Return the long name of an option, or the name of an argument."""
    return next((o for o in parameter.opts if o.startswith("--")), str(parameter.opts[0]))


def is_argument(parameter: Any) -> bool:  # noqa: ANN401
    """Whether a parameter of typer's is told by its place."""
    return not parameter.opts[0].startswith("-")


def keys_of(step: Step) -> dict[str, Any]:
    """Return typer's parameters by the key that they have in the file."""
    found = {flag_of(p).removeprefix("--"): p for p in step.command.params}
    return {key: p for key, p in found.items() if key not in ("help", "version", *MANAGED)}


def command_line(step: Step, paths: Mapping[str, Path]) -> list[str]:
    """Return the words behind the command, each used step's name replaced by its output."""
    keys = keys_of(step)
    options: list[str] = []
    arguments: dict[str, list[str]] = {}
    for name, value in step.given.items():
        parameter = keys[name.replace("_", "-")]
        if is_argument(parameter):
            arguments[parameter.name] = _argument(step, name, parameter, value, paths)
        else:
            options += _option(step, name, parameter, value, paths)
    ordered = [arguments.get(p.name, []) for p in step.command.params if is_argument(p)]
    return [*options, "--", *(word for words in ordered for word in words)]


def _argument(
    step: Step,
    name: str,
    parameter: Any,  # noqa: ANN401
    value: object,
    paths: Mapping[str, Path],
) -> list[str]:
    words = _words(step, name, value)
    if parameter.nargs == 1 and len(words) != 1:
        raise RecipeError(step.place(name), f"takes one value, not {len(words)}")
    return [resolved(word, paths) for word in words]


def _option(
    step: Step,
    name: str,
    parameter: Any,  # noqa: ANN401
    value: object,
    paths: Mapping[str, Path],
) -> list[str]:
    flag = flag_of(parameter)
    if parameter.is_flag:
        if not isinstance(value, bool):
            raise RecipeError(step.place(name), f"{value!r} is neither true nor false")
        off = parameter.secondary_opts
        return [flag] if value else off[:1]
    words = [resolved(word, paths) for word in _words(step, name, value)]
    several = parameter.multiple and not _are_numbers(value)
    # A list of numbers is one value, written with commas: layers, or a number for each model.
    return [f"{flag}={word}" for word in (words if several else [",".join(words)])]


def _are_numbers(value: object) -> bool:
    items = value if isinstance(value, list) else [value]
    return all(isinstance(item, int | float) for item in items)


def _words(step: Step, name: str, value: object) -> list[str]:
    items = value if isinstance(value, list) else [value]
    if not items or not all(isinstance(item, str | int | float) for item in items):
        fact = "has no value" if value in (None, []) else "is neither a value nor a list of values"
        raise RecipeError(step.place(name), fact, "write it as the command line takes it")
    return [str(item).lower() if isinstance(item, bool) else str(item) for item in items]


def texts(value: object) -> list[str]:
    """Return the words of a value."""
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, str)]


def named(value: object, names: Sequence[str]) -> set[str]:
    """Return the steps that a value names."""
    found: set[str] = set()
    stand_ins = {name: Path(f"/{n}/") for n, name in enumerate(names)}
    for text in texts(value):
        found |= {n for n in names if resolved(text, {n: stand_ins[n]}) != text}
    return found
