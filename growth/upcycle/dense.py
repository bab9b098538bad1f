"""A dense model as it is read before its feed-forwards become experts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from growth.upcycle.layout import FEED_FORWARD
from surgery.anatomy import Anatomy, anatomy
from surgery.checkpoint import Checkpoint
from surgery.errors import PlanError
from surgery.layers.kinds import refuse_recursive

COMPUTABLE = ("F64", "F32", "F16", "BF16")
NO_TENSOR = "self_attn.rotary_emb.inv_freq"  # old checkpoints hold it; it is computed
# What transformers takes where a config does not say; a mixture's class has other defaults.
_COMMON: Mapping[str, Any] = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_QWEN = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        **_COMMON,
        "max_position_embeddings": 2048,
        "num_key_value_heads": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mistral": {
        **_COMMON,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": {**_COMMON, **_QWEN},
    "qwen3": {**_COMMON, **_QWEN, "head_dim": 128},
}
WINDOWS_FROM = 28  # Qwen's max_window_layers where the config does not say
ROPE_THETA = 10_000.0  # of all four families; Mixtral's class would take 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """A dense model.

    Attributes:
        settings: the config with what transformers would take where it says nothing.
        names: within a layer, outside the feed-forward.
        windows: the attention window of each layer, None where all is seen.
        hidden, width: numbers in the residual stream and inside a feed-forward.
        dtype: of the feed-forwards.
    """

    source: Checkpoint
    parts: Anatomy
    settings: Mapping[str, Any]
    names: tuple[str, ...]
    windows: tuple[int | None, ...]
    hidden: int
    width: int
    dtype: str


def read_dense(base: Checkpoint) -> Dense:
    """Read a dense decoder whose layers are all alike but for their attention window.

    Raises:
        PlanError: it is a mixture already, no decoder of a known family, packed, has another
            kind of feed-forward, or lacks what a result would need.
    """
    if base.config is None:
        fact = "holds no config.json, without which a mixture cannot be loaded"
        raise PlanError(base.files[0], fact, "name the model's directory")
    refuse_recursive(base)
    parts = anatomy(base)
    _check_family(base, parts)
    names = _names_of_layers(base, parts)
    gate, up, down = (
        base.tensors[parts.stack.name(0, f"mlp.{each}.weight")] for each in FEED_FORWARD
    )
    width, hidden = gate.shape
    if up.shape != gate.shape or down.shape != (hidden, width):
        fact = f"has projections of {list(gate.shape)}, {list(up.shape)} and {list(down.shape)}"
        raise PlanError(base.ref, f"{fact}, which make no gated feed-forward")
    settings = _settings(base.config, parts.family)
    return Dense(
        source=base,
        parts=parts,
        settings=settings,
        names=names,
        windows=_windows(settings, parts),
        hidden=hidden,
        width=width,
        dtype=gate.dtype,
    )


def _check_family(base: Checkpoint, parts: Anatomy) -> None:
    config = base.config or {}
    place = f"{base.ref} ({parts.family})"
    if parts.experts:
        fact = f"is a mixture of {parts.experts} experts already"
        raise PlanError(place, fact, "start from a dense model")
    if parts.family not in DEFAULTS:
        known = ", ".join(DEFAULTS)
        fact = "is of a family that no mixture layout is known for"
        raise PlanError(place, fact, f"start from one of {known}")
    architectures = config.get("architectures") or ["ForCausalLM"]
    if not str(architectures[0]).endswith("ForCausalLM"):
        fact = f"is a {architectures[0]}, which is no causal language model"
        raise PlanError(place, fact, "name the language model itself")
    if config.get("quantization_config"):
        raise PlanError(place, "is quantised", "dequantise it first")
    if parts.lost_head:
        fact = "does not tie the output head to the embedding, but there is no head"
        raise PlanError(base.root / "config.json", fact, "restore the missing tensor")


def _names_of_layers(base: Checkpoint, parts: Anatomy) -> tuple[str, ...]:
    """Return the names in every layer outside its gated feed-forward.

    Raises:
        PlanError: layers differ, or their feed-forward is of another kind.
    """
    own = {f"mlp.{each}.weight" for each in FEED_FORWARD}
    alike = {n: set(names) - {NO_TENSOR} for n, names in parts.stack.layers.items()}
    for layer, names in alike.items():
        missing = sorted(own - names)
        if missing:
            fact = f"layer {layer} has no {missing[0]}, so its feed-forward is not a gated one"
            raise PlanError(base.ref, fact, "only gated feed-forwards become experts")
        if names != alike[0]:
            fact = f"layers 0 and {layer} hold different tensors ({min(names ^ alike[0])})"
            raise PlanError(base.ref, fact, "only models of like layers are supported")
        _check_tensors(base, parts, layer)
    return tuple(sorted(alike[0] - own))


def _check_tensors(base: Checkpoint, parts: Anatomy, layer: int) -> None:
    for each in FEED_FORWARD:
        tensor, first = (
            base.tensors[parts.stack.name(n, f"mlp.{each}.weight")] for n in (layer, 0)
        )
        if tensor.dtype not in COMPUTABLE or len(tensor.shape) != 2:  # noqa: PLR2004 - a matrix
            fact = f"is stored as {tensor.dtype} {list(tensor.shape)}, not as a matrix of floats"
            raise PlanError(tensor.name, fact, "dequantise the checkpoint first")
        if tensor.shape != first.shape:
            fact = f"is {list(tensor.shape)}, and in layer 0 {list(first.shape)}"
            raise PlanError(tensor.name, fact, "all experts of a model are of one width")


def _settings(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Say outright what the dense model's class takes for granted."""
    found = {**DEFAULTS[family], **config}
    heads = found["num_attention_heads"]
    found["num_key_value_heads"] = found.get("num_key_value_heads") or heads
    found["head_dim"] = found.get("head_dim") or found["hidden_size"] // heads
    rope = found.get("rope_parameters")
    if isinstance(rope, dict):
        found["rope_parameters"] = {"rope_theta": found.get("rope_theta", ROPE_THETA), **rope}
    else:
        found.setdefault("rope_theta", ROPE_THETA)
    return found


def _windows(settings: Mapping[str, Any], parts: Anatomy) -> tuple[int | None, ...]:
    """Return the attention window of each layer, as the stock classes take it."""
    window = settings.get("sliding_window")
    if parts.family == "mistral":
        return (window,) * parts.layers
    if parts.family == "llama" or not settings.get("use_sliding_window") or window is None:
        return (None,) * parts.layers
    start = settings.get("max_window_layers", WINDOWS_FROM)
    told = settings.get("layer_types")
    slides = [each == "sliding_attention" for each in told or ()] or [
        layer >= start for layer in range(parts.layers)
    ]
    return tuple(window if each else None for each in slides)
