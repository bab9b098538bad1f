"""Config keys that tell by rule what each layer is: windows, rotary embedding, experts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.anatomy import Anatomy, dig
from surgery.layers.families import (
    DENSE_FIRST,
    FIRST_IS_OWN,
    FULL,
    LAYER_TYPES,
    LINEAR,
    NO_ROPE,
    PERIODS,
    SLIDING,
    Every,
    Late,
    family_of,
)
from surgery.layers.keys import LINEAR_LAYERS, OVERRIDDEN

Config = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rule:
    """A key that tells by rule, for each layer, what it is.

    Attributes:
        key: the entry that an error names.
        reads: entries that have no further meaning where the rule applies.
        told: the values for n layers; None where the rule does not apply to this config.
        spelled: the config entries that say a given list outright; None where none can.
    """

    key: str
    reads: frozenset[str]
    told: Callable[[Config, int], list[Any] | None]
    spelled: Callable[[Config, list[Any]], Config | None]


def _number(config: Config, key: str | None, default: int) -> int | None:
    found = config.get(key, default) if key else default
    return found if type(found) is int else None


def _prefix_length(values: Sequence[Any], first: object) -> int | None:
    """Return how many leading values equal `first`, if no later one does."""
    count = next((i for i, value in enumerate(values) if value != first), len(values))
    return count if first not in values[count:] else None


def _layer_types(config: Config, n: int) -> list[Any] | None:
    implied = LAYER_TYPES.get(family_of(config))
    if implied is None or config.get("layer_types") is not None:
        return None
    if isinstance(implied, Late):
        return _late(implied, config, n)
    return _every(implied, config, n)


def _every(implied: Every, config: Config, n: int) -> list[Any] | None:
    every = _number(config, implied.key, implied.n)
    if every is None or every < 1:
        return None
    special = 0 if implied.first else every - 1
    return [implied.special if i % every == special else implied.other for i in range(n)]


def _late(implied: Late, config: Config, n: int) -> list[Any] | None:
    start = _number(config, "max_window_layers", implied.start)
    used = config.get("use_sliding_window") or not implied.switch
    if not used or config.get("sliding_window", implied.window) is None or start is None:
        return [FULL] * n
    if implied.early:
        return [FULL if i % 2 or i >= start else SLIDING for i in range(n)]
    return [SLIDING if i >= start else FULL for i in range(n)]


def _no_rope(config: Config, n: int) -> list[Any] | None:
    every = _number(config, "no_rope_layer_interval", NO_ROPE.get(family_of(config), 0))
    if config.get("no_rope_layers") or not every:
        return None
    return [int((i + 1) % every != 0) for i in range(n)]


def _spell_no_rope(config: Config, wanted: list[Any]) -> Config | None:
    return {"no_rope_layers": wanted} if family_of(config) in NO_ROPE else None


def _first_dense(config: Config, n: int) -> list[Any] | None:
    implied = DENSE_FIRST.get(family_of(config))
    key = implied.key if implied else "first_k_dense_replace"
    count = _number(config, key, implied.n if implied else -1)
    if count is None or count < 0 or config.get("mlp_layer_types"):
        return None
    every = config.get("moe_layer_freq", 1)
    listed = every if isinstance(every, list) else None
    kept = [bool(listed[i]) if listed else i % (every or 1) == 0 for i in range(n)]
    return ["sparse" if i >= count and kept[i] else "dense" for i in range(n)]


def _spell_first_dense(config: Config, wanted: list[Any]) -> Config | None:
    implied = DENSE_FIRST.get(family_of(config))
    if implied and implied.listed:
        return {"mlp_layer_types": wanted}
    count = _prefix_length(wanted, "dense")
    key = implied.key if implied else "first_k_dense_replace"
    plain = config.get("moe_layer_freq", 1) == 1
    return {key: count} if plain and key and count is not None else None


def _sparse_step(config: Config, n: int) -> list[Any] | None:
    step = config.get("decoder_sparse_step")
    if type(step) is not int or step < 1 or config.get("mlp_layer_types"):
        return None
    dense = set(config.get("mlp_only_layers") or ())
    return ["dense" if i in dense or (i + 1) % step else "sparse" for i in range(n)]


def _spell_sparse_step(_: Config, wanted: list[Any]) -> Config:
    dense = [i for i, kind in enumerate(wanted) if kind == "dense"]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def _moe_step(config: Config, n: int) -> list[Any] | None:
    step = _number(config, "interleave_moe_layer_step", int(family_of(config) == "llama4_text"))
    if not step or isinstance(config.get("moe_layers"), list):
        return None
    return [i % step == step - 1 for i in range(n)]


def _spell_moe_step(config: Config, wanted: list[Any]) -> Config | None:
    if family_of(config) != "llama4_text":
        return None
    return {"moe_layers": [i for i, sparse in enumerate(wanted) if sparse]}


def _moe_range(config: Config, n: int) -> list[Any] | None:
    """Experts in every n-th layer of a range, both ends included (ERNIE 4.5)."""
    if config.get("model_type") != "ernie4_5_moe":
        return None
    every = config.get("moe_layer_interval", 1)
    first, last = config.get("moe_layer_start_index", 1), config.get("moe_layer_end_index", -1)
    last = n - 1 if last == -1 else last
    return [(i + 1) % every == 0 and first <= i <= last for i in range(n)]


def _spell_moe_range(_: Config, wanted: list[Any]) -> Config | None:
    first = wanted.index(True) if True in wanted else len(wanted)
    count = _prefix_length(wanted[first:], True)
    if count is None:
        return None
    entries = {"moe_layer_interval": 1, "moe_layer_start_index": first}
    return {**entries, "moe_layer_end_index": first + count - 1}


def _period(kind: str) -> Callable[[Config, int], list[Any] | None]:
    def told(config: Config, n: int) -> list[Any] | None:
        defaults = PERIODS.get(family_of(config), {}).get(kind, (0, 0))
        period = _number(config, f"{kind}_layer_period", defaults[0])
        offset = _number(config, f"{kind}_layer_offset", defaults[1])
        return [i % period == offset for i in range(n)] if period else None

    return told


def _cycle(config: Config, n: int) -> list[Any] | None:
    """Kinds that repeat (RecurrentGemma)."""
    kinds = config.get("block_types")
    if config.get("model_type") != "recurrent_gemma":
        return None
    kinds = kinds or ["recurrent", "recurrent", "attention"]
    return [kinds[i % len(kinds)] for i in range(n)]


def _attention_types(config: Config, n: int) -> list[Any] | None:
    """Kinds with counts (GPT-Neo): [[["global", "local"], 12]]."""
    if config.get("model_type") != "gpt_neo":
        return None
    groups = config.get("attention_types") or [[["global", "local"], 12]]
    return [kind for kinds, count in groups for _ in range(count) for kind in kinds][:n]


def _spell_attention_types(_: Config, wanted: list[Any]) -> Config:
    return {"attention_types": [[wanted, 1]], "attention_layers": wanted}


def _first_is_own(config: Config, n: int) -> list[Any] | None:
    return [i == 0 for i in range(n)] if family_of(config) in FIRST_IS_OWN else None


def _cannot(_: Config, __: list[Any]) -> None:
    return None


PATTERNS = frozenset(key for key, stands_for in OVERRIDDEN.items() if stands_for == "layer_types")
RULES = (
    Rule("layer_types", PATTERNS, _layer_types, lambda _, wanted: {"layer_types": wanted}),
    Rule("no_rope_layers", frozenset({"no_rope_layer_interval"}), _no_rope, _spell_no_rope),
    Rule(
        "first_k_dense_replace",
        frozenset({"first_k_dense_replace", "num_dense_layers"}),
        _first_dense,
        _spell_first_dense,
    ),
    Rule(
        "decoder_sparse_step", frozenset({"decoder_sparse_step"}), _sparse_step, _spell_sparse_step
    ),
    Rule(
        "interleave_moe_layer_step",
        frozenset({"interleave_moe_layer_step"}),
        _moe_step,
        _spell_moe_step,
    ),
    Rule(
        "moe_layer_interval",
        frozenset({"moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index"}),
        _moe_range,
        _spell_moe_range,
    ),
    Rule(
        "attn_layer_period",
        frozenset({"attn_layer_period", "attn_layer_offset"}),
        _period("attn"),
        _cannot,
    ),
    Rule(
        "expert_layer_period",
        frozenset({"expert_layer_period", "expert_layer_offset"}),
        _period("expert"),
        _cannot,
    ),
    Rule("block_types", frozenset(), _cycle, lambda _, wanted: {"block_types": wanted}),
    Rule("attention_types", frozenset(), _attention_types, _spell_attention_types),
    Rule("model_type", frozenset(), _first_is_own, _cannot),
)


def told_layers(config: Mapping[str, Any], anatomy: Anatomy) -> list[str] | None:
    """Return the kind of each layer where the config tells it, for display."""
    text = dict(dig(config, anatomy.section))
    text.setdefault("model_type", config.get("base_model_type") or config.get("model_type"))
    listed = text.get("layer_types")
    kinds = listed if isinstance(listed, list) else _layer_types(text, anatomy.layers)
    linear = config.get(LINEAR_LAYERS)
    if isinstance(linear, list):
        kinds = [
            LINEAR if n in linear else kind
            for n, kind in enumerate(kinds or [FULL] * anatomy.layers)
        ]
    return None if kinds is None else [str(kind) for kind in kinds]
