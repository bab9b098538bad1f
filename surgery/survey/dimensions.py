"""Widths, heads, vocabulary and context, as the config or the embedding tells them."""

from collections.abc import Mapping
from typing import Any

from surgery.anatomy import Anatomy
from surgery.checkpoint import Checkpoint

MAX = 2**63  # larger numbers say that the config is broken, not how wide a model is
KEYS = {
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "feed_forward": ("intermediate_size", "n_inner", "ffn_dim", "d_ff"),
    "expert_feed_forward": ("moe_intermediate_size",),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_width": ("head_dim",),
    "vocabulary": ("vocab_size",),
    "context": ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length"),
    "window": ("sliding_window",),
    "rope_theta": ("rope_theta",),
}
PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k")


def dimensions(
    checkpoint: Checkpoint, text: Mapping[str, Any], parts: Anatomy | None
) -> dict[str, int | float]:
    """Return what is told, by our own names; a bare file tells width and vocabulary only.

    Args:
        text: the part of the config that describes the language model.
    """
    found = {name: value for name, keys in KEYS.items() if (value := _first(text, keys))}
    nested = text.get("rope_parameters")
    if isinstance(nested, dict) and (theta := _first(nested, ("rope_theta",))):
        found["rope_theta"] = theta
    latent = "kv_lora_rank" in text  # its heads have several widths, none of them this one
    if {"heads", "hidden"} <= set(found) and "head_width" not in found and not latent:
        found["head_width"] = int(found["hidden"] // found["heads"])
    embedding = checkpoint.tensors[parts.embedding] if parts and parts.embedding else None
    if embedding:
        found.setdefault("hidden", embedding.shape[1])
        found["vocabulary"] = embedding.shape[0]
    return {name: found[name] for name in KEYS if name in found}


def expert_counts(text: Mapping[str, Any], experts: int) -> dict[str, int] | None:
    """Return experts per layer and per token, or None for a dense model."""
    if not experts:
        return None
    told = _first(text, PER_TOKEN)
    per_token = {"per_token": int(told)} if told and told <= experts else {}
    return {"per_layer": experts, **per_token}


def _first(text: Mapping[str, Any], keys: tuple[str, ...]) -> int | float | None:
    """Return the first positive number under one of the keys."""
    return next((text[key] for key in keys if _is_number(text.get(key))), None)


def _is_number(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value < MAX  # type: ignore[operator]
