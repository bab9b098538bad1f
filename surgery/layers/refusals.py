"""What ties a layer to its place so that it cannot move, told before any work."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from surgery.errors import PlanError
from surgery.layers.families import (
    DEPTH_MATHS,
    FIRST_IS_OWN,
    FULL,
    LAST_IS_FULL,
    STAND_INS,
    UNLISTED,
    family_of,
)
from surgery.layers.keys import (
    ASSUMED,
    HARMLESS,
    NUMBERS,
    OVERRIDDEN,
    PER_LAYER,
    REFUSED,
    SUSPICIOUS,
    SWITCHES,
)
from surgery.layers.rules import RULES

Config = dict[str, Any]
WRITE_OUT = (
    "write it out first, in Python with transformers: "
    "AutoConfig.from_pretrained(BASE).save_pretrained(BASE)"
)


def refuse_unknown(old: Config, layers: int) -> None:
    """Refuse a config that ties layers to their numbers, or may do so in an unknown way.

    Raises:
        PlanError: with the entry and the reason.
    """
    family = family_of(old)
    if family in DEPTH_MATHS:
        raise PlanError(family, f"layers cannot move: {DEPTH_MATHS[family]}")
    for key, why in REFUSED.items():
        value = old.get(key, ASSUMED.get((family, key)))
        if value and value != list(range(layers)):
            raise PlanError(f"config.json, {key}", f"layers cannot move: {why}")
    given = {key for key, value in old.items() if value is not None}
    given |= {stands_for for key, stands_for in STAND_INS.items() if key in given}
    missing = next((key for key in UNLISTED.get(family, ()) if key not in given), None)
    if missing is not None:
        fact = f"does not say {missing}, which {family} makes up by a rule of its own"
        raise PlanError("config.json", fact, WRITE_OUT)
    handled = {key for rule in RULES if rule.told(old, layers) is not None for key in rule.reads}
    for key, value in old.items():
        if key not in handled and _may_number_layers(key, value, old, layers):
            fact = f"is {value!r}, which may tell layers apart by their numbers"
            raise PlanError(f"config.json, {key}", fact, "report it as a case to support")


def _may_number_layers(key: str, value: object, old: Mapping[str, Any], layers: int) -> bool:
    known = NUMBERS | PER_LAYER | HARMLESS | set(REFUSED) | {"hybrid_override_pattern"}
    if key in known or old.get(OVERRIDDEN.get(key, "")):
        return False
    if key in SWITCHES and not old.get(SWITCHES[key]):
        return False
    if isinstance(value, list) and "layer" in key and len(value) != layers:
        return any(type(number) is int and 0 <= number < layers for number in value)
    counts = (type(value) is int and value > 0) or (isinstance(value, str) and len(value) == layers)
    return counts and SUSPICIOUS.search(key) is not None


def refuse_first(old: Config, sources: Sequence[int]) -> None:
    """Refuse to move a first layer that is unlike all others, or to put another in its place.

    Raises:
        PlanError: with the reason.
    """
    family = family_of(old)
    if family in FIRST_IS_OWN and [i for i, s in enumerate(sources) if s == 0] != [0]:
        fact = f"its first layer {FIRST_IS_OWN[family]}, so it cannot move or be repeated"
        raise PlanError(family, fact, "keep layer 0 at the start, once: for instance --map 0-7,1-7")


def refuse_place(config: Config, new: Config, old: Config, sources: Sequence[int]) -> None:
    """Refuse a new sequence in which a layer stands where it cannot.

    Raises:
        PlanError: with the entry and the reason.
    """
    if old.get("scale_attn_by_inverse_layer_idx") and list(sources) != list(range(len(sources))):
        fact = "divides attention by the layer's number, which changes when a layer moves"
        raise PlanError("config.json, scale_attn_by_inverse_layer_idx", fact)
    kinds = new.get("layer_types")
    if family_of(old) in LAST_IS_FULL and kinds and kinds[-1] != FULL:
        fact = f"layer {len(sources) - 1} would have {kinds[-1]}, and the last must have {FULL}"
        raise PlanError("config.json, layer_types", fact, "end the map with such a layer")
    if (new.get("indexer_types") or ["full"])[0] == "shared":
        fact = "the first layer would share the index of an earlier one"
        raise PlanError("config.json, indexer_types", fact, "start the map with a full layer")
    for key, count in _image_layers(config):
        if list(sources[:count]) != list(range(count)):
            fact = f"image features enter behind the first {count} layers, which would change"
            raise PlanError(f"config.json, {key}", fact, f"begin the map with 0-{count - 1}")


def _image_layers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield vision towers that feed the first layers of the language model (Qwen3-VL)."""
    for key, part in config.items():
        if isinstance(part, dict) and isinstance(part.get("deepstack_visual_indexes"), list):
            yield f"{key}.deepstack_visual_indexes", len(part["deepstack_visual_indexes"])
