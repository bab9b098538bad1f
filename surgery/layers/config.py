"""Carry a config from one sequence of layers to another: every per-layer fact by one map.

Nothing is made anew by rule: what layer i was told about itself goes wherever layer i goes. A
rule (`every sixth layer is global`) that does not hold for the new sequence is written out as a
list where the architecture knows one, and refused otherwise.
"""

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

from surgery.anatomy import LAYER_KEYS, Anatomy, dig, predictors
from surgery.errors import PlanError
from surgery.layers.keys import (
    COUNTS,
    LINEAR_LAYERS,
    MAYBE_PER_LAYER,
    NOT_LAYERS,
    NUMBERS,
    PER_LAYER,
)
from surgery.layers.names import rename_modules
from surgery.layers.refusals import refuse_first, refuse_place, refuse_unknown
from surgery.layers.rules import RULES, Config, Rule

MINICPM_SCALE = 1.0  # scale_depth where the config does not say


def remap_config(config: Config, anatomy: Anatomy, sources: Sequence[int]) -> Config:
    """Return the config of a model whose layer i is the source's layer `sources[i]`.

    Raises:
        PlanError: something in the config ties a layer to its depth and cannot be carried over.
    """
    _refuse_long(text_config(config, anatomy), anatomy)
    new = deepcopy(config)
    text = new
    for key in anatomy.section:
        text = text[key]
    if anatomy.layer_key:
        text[anatomy.layer_key] = len(sources)
    for key in (*LAYER_KEYS, *COUNTS):
        if text.get(key) == anatomy.layers:
            text[key] = len(sources)
    if list(sources) == list(range(anatomy.layers)):
        return new
    old = text_config(config, anatomy)
    refuse_unknown(old, anatomy.layers)
    refuse_first(old, sources)
    for table, key, value in _entries(text):
        table[key] = _moved(key, value, sources, anatomy.layers)
    _compensate(text, old, len(sources), anatomy.layers)
    for rule in RULES:
        _remap_rule(rule, text, old, sources, anatomy.layers)
    refuse_place(config, text, old, sources)
    rename_modules(new, anatomy, sources)
    if isinstance(new.get(LINEAR_LAYERS), list):
        new[LINEAR_LAYERS] = _moved(LINEAR_LAYERS, new[LINEAR_LAYERS], sources, anatomy.layers)
    return new


def text_config(config: Config, anatomy: Anatomy) -> Config:
    """Return the part of a config that describes the stack, with its model_type.

    A class of ours tells beside it which stock architecture that is, and which layers are linear.
    """
    old = dict(dig(config, anatomy.section))
    old.setdefault("model_type", config.get("base_model_type") or config.get("model_type"))
    if isinstance(config.get(LINEAR_LAYERS), list):
        old[LINEAR_LAYERS] = config[LINEAR_LAYERS]
    return old


def layer_facts(config: Config, anatomy: Anatomy) -> list[tuple[str, ...]]:
    """Return all that the config says of each layer: layers told the same are built the same."""
    layers = anatomy.layers
    old = text_config(config, anatomy)
    told = [kinds for rule in RULES if (kinds := rule.told(old, layers)) is not None]
    for _, key, value in _entries(old):
        if key in NUMBERS and isinstance(value, list):
            told.append([i in value for i in range(layers)])
        elif key == "per_layer_config" and isinstance(value, dict):
            told.append([_by_layer(value).get(i) for i in range(layers)])
        elif _is_per_layer(key, value, layers):
            told.append(list(value))
    return [tuple(repr(kinds[i]) for kinds in told) for i in range(layers)]


def _entries(table: Config) -> Iterator[tuple[Config, str, Any]]:
    """Yield the entries of a table and of the tables within, but not of other models' configs."""
    for key, value in list(table.items()):
        if isinstance(value, dict) and key not in ("per_layer_config", "quantization_config"):
            if not key.endswith("_config") or "model_type" not in value:
                yield from _entries(value)
        else:
            yield table, key, value


def _moved(key: str, value: Any, sources: Sequence[int], layers: int) -> Any:  # noqa: ANN401
    """Return an entry's value for the new sequence of layers."""
    grown = len(sources) - layers
    if key in NUMBERS and isinstance(value, list):
        behind = [number + grown for number in value if number >= layers]
        return [i for i, source in enumerate(sources) if source in value] + behind
    if key == "per_layer_config" and isinstance(value, dict):
        own = _by_layer(value)
        return {str(i): own[source] for i, source in enumerate(sources) if source in own}
    if key == "kv_source_layers" and value:  # each layer its own; others are refused
        return list(range(len(sources)))
    if not _is_per_layer(key, value, layers):
        return value
    if isinstance(value, str):
        return "".join(value[source] for source in sources) + value[layers:]
    return [value[source] for source in sources] + list(value[layers:])


def _by_layer(table: Config) -> dict[int, Any]:
    """Return a table by layer number; transformers writes its keys as 05 where there is a 10."""
    return {int(key): value for key, value in table.items() if key.isdecimal()}


def _is_per_layer(key: str, value: object, layers: int) -> bool:
    if key == "hybrid_override_pattern" and isinstance(value, str):
        return _is_whole(key, value, layers)
    if not isinstance(value, list) or key in NOT_LAYERS or key in NUMBERS:
        return False
    if key in PER_LAYER:
        return bool(value) and _is_whole(key, value, layers)
    if len(value) != layers or layers == 1:
        return False
    if key in MAYBE_PER_LAYER or "layer" in key or "block" in key:
        return True
    fact = f"has {layers} entries, as many as there are layers, and may be about them or not"
    remedy = "rename or remove it, or report it as a case to support"
    raise PlanError(f"config.json, {key}", fact, remedy)


def _is_whole(key: str, value: list[Any] | str, layers: int) -> bool:
    if len(value) >= layers:
        return True
    fact = f"has {len(value)} entries for {layers} layers"
    raise PlanError(f"config.json, {key}", fact, "restore the config")


def _refuse_long(old: Config, anatomy: Anatomy) -> None:
    """Refuse a list with more entries than there are layers, predictors behind them included."""
    most = anatomy.layers + (anatomy.extra_layers or predictors(old))
    for _, key, value in _entries(old):
        if key in PER_LAYER and isinstance(value, list) and len(value) > most:
            fact = f"has {len(value)} entries for {anatomy.layers} layers"
            raise PlanError(f"config.json, {key}", fact, "restore the config")


def _compensate(text: Config, old: Config, count: int, layers: int) -> None:
    """Keep each residual branch's factor scale_depth / sqrt(layers) as it was (MiniCPM)."""
    name = str(old.get("model_type", ""))
    if name in ("minicpm", "minicpm3") and old.get("scale_depth", MINICPM_SCALE) is not None:
        factor = old.get("scale_depth", MINICPM_SCALE)
        text["scale_depth"] = factor * math.sqrt(count / layers)


def _remap_rule(rule: Rule, text: Config, old: Config, sources: Sequence[int], layers: int) -> None:
    before = rule.told(old, layers)
    if before is None:
        return
    wanted = [before[source] for source in sources]
    typed = {**text, "model_type": old.get("model_type")}
    now = rule.told(typed, len(sources))
    if now is None or now == wanted:  # a list that was moved with its layers says it now
        return
    spelled = rule.spelled(typed, wanted)
    if spelled is None:
        where = next(i for i, (a, b) in enumerate(zip(wanted, now, strict=True)) if a != b)
        fact = f"cannot say that layer {where} is to be what layer {sources[where]} was"
        raise PlanError(f"config.json, {rule.key}", fact, _keeping(before))
    text.update(spelled)


def _keeping(before: Sequence[object]) -> str:
    """Advise a map that leaves the layers of a special start where they are."""
    start = next((i for i, kind in enumerate(before) if kind != before[0]), len(before))
    last = len(before) - 1
    if 0 < start <= last and before[0] not in before[start:]:
        return f"keep those layers at the start, once: for instance --map 0-{last},{start}-{last}"
    return "choose a map that keeps its pattern"
