"""Config keys that tell by rule what each layer is: windows, rotary embedding, experts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.anatomy import Anatomy, dig

Config = dict[str, Any]

# What an architecture assumes when its config does not say (transformers 5.23): every n-th
# layer has full attention, or no rotary embedding.
DEFAULT_PATTERN = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4, "gpt_oss": 2, "olmo3": 4}
DEFAULT_NO_ROPE = {"smollm3": 4, "llama4_text": 4}


@dataclass(frozen=True, slots=True)
class Rule:
    """A key that tells by rule, for each layer, what it is.

    Attributes:
        told: the values for n layers; None where the rule does not apply to this config.
        spelled: the config entries that say a given list outright; None where none can.
    """

    key: str
    told: Callable[[Config, int], list[Any] | None]
    spelled: Callable[[Config, list[Any]], Config | None]


def _prefix_length(values: Sequence[Any], first: object) -> int | None:
    """Return how many leading values equal `first`, if no later one does."""
    count = next((i for i, value in enumerate(values) if value != first), len(values))
    return count if first not in values[count:] else None


def _alternating(config: Config, n: int) -> list[Any] | None:
    default = DEFAULT_PATTERN.get(str(config.get("model_type")))
    every = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or default
    if "layer_types" in config or type(every) is not int:
        return None
    return ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(n)]


def _late_windows(config: Config, n: int) -> list[Any] | None:
    start = config.get("max_window_layers")
    if "layer_types" in config or not config.get("use_sliding_window") or type(start) is not int:
        return None
    return ["sliding_attention" if i >= start else "full_attention" for i in range(n)]


def _linear_interval(config: Config, n: int) -> list[Any] | None:
    every = config.get("full_attention_interval")
    if "layer_types" in config or type(every) is not int:
        return None
    return ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(n)]


def _no_rope(config: Config, n: int) -> list[Any] | None:
    default = DEFAULT_NO_ROPE.get(str(config.get("model_type")))
    every = config.get("no_rope_layer_interval") or default
    if config.get("no_rope_layers") or type(every) is not int:
        return None
    return [int((i + 1) % every != 0) for i in range(n)]


def _first_dense(config: Config, n: int) -> list[Any] | None:
    count = config.get("first_k_dense_replace")
    if type(count) is not int or config.get("mlp_layer_types"):
        return None
    every = config.get("moe_layer_freq", 1)
    return [
        "sparse" if i >= count and (not isinstance(every, int) or i % every == 0) else "dense"
        for i in range(n)
    ]


def _spell_first_dense(config: Config, wanted: list[Any]) -> Config | None:
    count = _prefix_length(wanted, "dense")
    return (
        None
        if count is None or config.get("moe_layer_freq", 1) != 1
        else {"first_k_dense_replace": count}
    )


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
    step = config.get("interleave_moe_layer_step")
    if type(step) is not int or step < 1 or config.get("moe_layers"):
        return None
    return [i % step == step - 1 for i in range(n)]


def _spell_moe_step(_: Config, wanted: list[Any]) -> Config:
    return {"moe_layers": [i for i, sparse in enumerate(wanted) if sparse]}


def _period(kind: str) -> Callable[[Config, int], list[Any] | None]:
    def told(config: Config, n: int) -> list[Any] | None:
        period, offset = config.get(f"{kind}_layer_period"), config.get(f"{kind}_layer_offset")
        if type(period) is not int or type(offset) is not int:
            return None
        return [i % period == offset for i in range(n)]

    return told


def _global_every(config: Config, n: int) -> list[Any] | None:
    every = config.get("global_attn_every_n_layers")
    if "layer_types" in config or type(every) is not int:
        return None
    return [i % every == 0 for i in range(n)]


def _layer_types(_: Config, wanted: list[Any]) -> Config:
    return {"layer_types": wanted}


def _cannot(_: Config, __: list[Any]) -> None:
    return None


RULES = (
    Rule("sliding_window_pattern", _alternating, _layer_types),
    Rule("max_window_layers", _late_windows, _layer_types),
    Rule("full_attention_interval", _linear_interval, _layer_types),
    Rule("no_rope_layer_interval", _no_rope, lambda _, wanted: {"no_rope_layers": wanted}),
    Rule("first_k_dense_replace", _first_dense, _spell_first_dense),
    Rule("decoder_sparse_step", _sparse_step, _spell_sparse_step),
    Rule("interleave_moe_layer_step", _moe_step, _spell_moe_step),
    Rule("attn_layer_period", _period("attn"), _cannot),
    Rule("expert_layer_period", _period("expert"), _cannot),
    Rule("global_attn_every_n_layers", _global_every, _cannot),
)


def told_layers(config: Mapping[str, Any], anatomy: Anatomy) -> list[str] | None:
    """Return the kind of each layer where the config tells it, for display."""
    text = dict(dig(config, anatomy.section))
    text.setdefault("model_type", config.get("model_type"))
    listed = text.get("layer_types")
    if isinstance(listed, list):
        return [str(kind) for kind in listed]
    rules = (_alternating, _late_windows, _linear_interval)
    return next((kinds for rule in rules if (kinds := rule(text, anatomy.layers))), None)
