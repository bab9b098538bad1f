"""The config of a widened model."""

from copy import deepcopy
from fractions import Fraction
from typing import Any

from growth.dimensions import Dimension, Dimensions
from growth.widen.asked import sizes_of
from growth.widen.maps import Widening
from surgery.anatomy import dig
from surgery.errors import PlanError

KEYS: tuple[tuple[Dimension, tuple[str, ...]], ...] = (
    # MiniCPM divides logits by the width over dim_model_base.
    ("hidden", ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "dim_model_base")),
    ("query", ("num_attention_heads", "n_head")),
    ("key", ("num_key_value_heads",)),
    ("ffn", ("intermediate_size", "n_inner", "ffn_dim", "intermediate_size_mlp")),
    ("expert ffn", ("moe_intermediate_size",)),
    ("shared ffn", ("shared_expert_intermediate_size",)),
)


def widened_config(config: dict[str, Any], found: Dimensions, how: Widening) -> dict[str, Any]:
    """Return the config with every width in step and the width of a head as it was.

    Raises:
        PlanError: a width that does not grow to a whole number.
    """
    new = deepcopy(config)
    text = dig(new, found.parts.section)
    assert isinstance(text, dict)  # noqa: S101 - a copy of what json gave
    for dimension, keys in KEYS:
        ratio = how.ratios.get(dimension, Fraction(1))
        for key in keys:
            if type(text.get(key)) is int:
                text[key] = _times(key, text[key], ratio)
    if "n_inner" in text and text["n_inner"] is None:
        size = sizes_of(found)[0]
        if how.size("ffn", size) != 4 * text["n_embd"]:
            text["n_inner"] = how.size("ffn", size)
    if "head_dim" in text or "num_key_value_heads" in text:
        text["head_dim"] = found.heads.width
    return new


def _times(key: str, value: int, ratio: Fraction) -> int:
    if (value * ratio).denominator != 1:
        raise PlanError(f"config.json, {key}", f"is {value}, which does not grow by {ratio}")
    return int(value * ratio)
