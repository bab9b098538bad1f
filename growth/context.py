"""Longer context by the config alone: rotary positions scaled, or a window; weights are copied."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from growth.rotary import PLAIN, Rotary, plain, read_rotary, with_rotary
from growth.window import with_window
from surgery.anatomy import dig
from surgery.checkpoint import Checkpoint
from surgery.checkpoint.jsonfile import read_json_object
from surgery.errors import CheckpointError, PlanError, RecipeError
from surgery.plan import Plan, Step, TensorSpec, check_plan

Method = Literal["linear", "ntk", "dynamic", "yarn", "lm-infinite"]
LENGTH = "max_position_embeddings"
ORIGINAL = "original_max_position_embeddings"
SETTINGS = "tokenizer_config.json"
MOST = 1 << 30  # positions
LEAST = 4  # dimensions; of two there is one frequency, and the exponent has no bound
LONGROPE = ("phi3", "phi4_multimodal")  # their class takes yarn for another method's name


def context(
    base: Checkpoint, *, factor: float, method: Method, original_max: int | None = None
) -> Plan:
    """Let a model read `factor` times as far as it was trained to.

    Of models with rotary positions of their own for sliding layers, only those for full attention
    are scaled: sliding layers look no further than before.

    Args:
        method: `linear` divides positions by the factor (position interpolation, arXiv
            2306.15595). `ntk` multiplies the base by factor ** (d / (d - 2)), for all lengths.
            `dynamic` does so by as much as a text is longer than the original length; shorter
            ones give the same logits as before. `yarn` interpolates low frequencies only and
            scales attention (arXiv 2309.00071). `lm-infinite` gives every layer a window of the
            original length (arXiv 2308.16137) and leaves the positions alone.
        original_max: positions the model was trained on; `max_position_embeddings` by default.

    Raises:
        RecipeError: the factor or the length makes no sense.
        PlanError: the model has no rotary positions, or is extended already.
    """
    factor = float(factor)
    _check(factor, method, original_max)
    if base.config is None:
        fact = "has no config.json, which is all that would change"
        raise CheckpointError(base.ref, fact, "name the model's directory")
    place = base.root / "config.json"
    from surgery.vocabulary.tables import section  # with numpy

    keys = section(base.config)
    text = dig(base.config, keys)
    family = str(text.get("model_type") or base.config.get("model_type", "unknown"))
    rotary = read_rotary(text, family, place)
    length = original_max or text.get(LENGTH)
    if type(length) is not int or length < 1:
        raise RecipeError(place, f"has no {LENGTH}", "say it: --original-max N")
    if length * factor > MOST:
        raise RecipeError(f"--factor {factor:g}", f"gives {length * factor:.3g} positions")
    if method == "lm-infinite":
        new = with_window(text, family, length, place, whole=not keys)
    else:
        _refuse_scaled(rotary, place)
        ask: dict[str, Any] = {"factor": factor, "method": method, "length": length}
        new = _scaled(text, rotary, family=family, place=place, **ask)
    new[LENGTH] = length if method == "dynamic" else int(length * factor)
    config = {**base.config, keys[0]: new} if keys else new
    notes = (*base.notes, *_notes(text, family, method))
    told = {"factor": factor, "method": method, "original_max": original_max}
    facts = {ORIGINAL: length, LENGTH: int(length * factor)}
    return _plan(base, config, told, facts, notes)


def _check(factor: float, method: str, original_max: int | None) -> None:
    if method not in get_args(Method):
        raise RecipeError(f"--method {method}", f"is none of {', '.join(get_args(Method))}")
    if not (math.isfinite(factor) and factor > 1):
        raise RecipeError(f"--factor {factor:g}", "is not above 1", "2 doubles the length")
    if original_max is not None and not 1 <= original_max <= MOST:
        raise RecipeError(f"--original-max {original_max}", f"is outside 1 to {MOST}")


def _refuse_scaled(rotary: Rotary, place: object) -> None:
    if rotary.kind not in PLAIN:
        fact = f"scales its positions already (rope_type {rotary.kind})"
        raise PlanError(place, fact, "start from the model before it was extended")


def _scaled(
    text: Mapping[str, Any],
    rotary: Rotary,
    *,
    family: str,
    factor: float,
    method: Method,
    length: int,
    place: object,
) -> dict[str, Any]:
    """Return the config of the language model with its positions scaled."""
    if method == "yarn" and family in LONGROPE:
        fact = f"is of the family {family}, whose class reads yarn as longrope"
        raise PlanError(place, fact, "take --method linear or dynamic")
    old = {key: value for key, value in rotary.parameters.items() if key != "type"}
    make: Callable[[], dict[str, Any]] = {
        "linear": lambda: {"rope_type": "linear", "factor": factor},
        "dynamic": lambda: {"rope_type": "dynamic", "factor": factor},
        "yarn": lambda: {"rope_type": "yarn", "factor": factor, ORIGINAL: length},
        "ntk": lambda: {"rope_type": "default", "rope_theta": _theta(rotary, factor, place)},
    }[method]
    found = with_rotary(text, rotary, {**old, **make()})
    if ORIGINAL in text:
        found[ORIGINAL] = length
    if rotary.head is not None and method in ("yarn", "dynamic"):
        found["head_dim"] = rotary.head  # transformers takes a null for the size itself here
    return found


def _theta(rotary: Rotary, factor: float, place: object) -> float:
    """Return the base whose lowest frequency is `factor` times lower, the highest the same."""
    theta, size = rotary.parameters.get("rope_theta"), rotary.dimensions
    if not isinstance(theta, int | float) or size is None:
        fact = "does not say rope_theta and the size of a head"
        raise PlanError(place, fact, "write them into it, or take --method dynamic")
    if size < LEAST:
        raise PlanError(place, f"rotates {size} dimensions of a head, which have one frequency")
    return float(theta * factor ** (size / (size - 2)))


def _plan(
    base: Checkpoint,
    config: dict[str, Any],
    parameters: Mapping[str, Any],
    facts: dict[str, int],
    notes: tuple[str, ...],
) -> Plan:
    stale = [name for name in base.tensors if name.endswith("rotary_emb.inv_freq")]
    kept = {name: tensor for name, tensor in base.tensors.items() if name not in stale}
    return check_plan(
        Plan(
            operation="context",
            parameters=parameters,
            sources=(base,),
            steps=tuple(
                Step(inputs=(t,), outputs=((name, TensorSpec(t.dtype, t.shape)),))
                for name, t in kept.items()
            ),
            order=tuple(kept),
            config=config,
            carried=base.carried,
            written=_settings(base, facts[ORIGINAL], facts[LENGTH]),
            dropped=dict.fromkeys(stale, "the frequencies follow from the config"),
            facts=facts,
            notes=notes,
        )
    )


def _settings(base: Checkpoint, before: int, after: int) -> dict[str, bytes]:
    """Return tokenizer_config.json with the new length, where it said the old one."""
    path = next((path for path in base.carried if path.name == SETTINGS), None)
    told = read_json_object(path) if path else {}
    if told.get("model_max_length") != before:
        return {}
    text = json.dumps({**told, "model_max_length": after}, indent=2, ensure_ascii=False)
    return {SETTINGS: text.encode() + b"\n"}


def _notes(text: Mapping[str, Any], family: str, method: Method) -> tuple[str, ...]:
    found = []
    if method == "lm-infinite":
        found.append(
            "the window stands for LM-Infinite's second half only: no class of transformers also "
            "keeps the first tokens in sight, without which quality falls once they leave it"
        )
        if family == "llama":
            found.append("the model is a Mistral now, which is a Llama with a window")
        scaled = text.get("rope_parameters") or text.get("rope_scaling") or {}
        if isinstance(scaled, dict) and not plain(scaled):
            found.append("its positions stay scaled as they were")
    if method == "dynamic":
        found.append(f"{LENGTH} stays the original length, which the scaling starts from")
    if method in ("linear", "ntk", "yarn"):
        found.append("short texts are read in another way too: a little training mends it")
    return tuple(found)
