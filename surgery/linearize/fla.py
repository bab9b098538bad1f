"""Gated linear attention in the layout of flash-linear-attention's GLAForCausalLM."""

from collections.abc import Iterator
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.errors import PlanError
from surgery.linearize.linearized import Linearized, copy_as, open_linearized, sizes_of, unknown
from surgery.plan import Step

TO, METHOD = "fla", "gla"
# In a layer, ours and theirs; all bytes are copied.
NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "mlp_norm.weight",
    **{f"mlp.{n}_proj.weight": f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")},
    **{f"self_attn.{n}_proj.weight": f"attn.{n}_proj.weight" for n in "qkvo"},
    "self_attn.mixer.gate.weight": "attn.g_proj.weight",
    "self_attn.mixer.decay_in.weight": "attn.gk_proj.0.weight",
    "self_attn.mixer.decay_out.weight": "attn.gk_proj.1.weight",
    "self_attn.mixer.decay_out.bias": "attn.gk_proj.1.bias",
    "self_attn.mixer.norm": "attn.g_norm_swish_gate.weight",
}
OUTSIDE = {"model.norm.weight": "model.norm.weight", "lm_head.weight": "lm_head.weight"}
UNUSED = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
NOTE = "it loads where the package flash-linear-attention is imported: import fla"


def open_for(source: Checkpoint) -> Linearized:
    """Return the opened checkpoint.

    Raises:
        PlanError: it is not exactly a model of that class.
        CheckpointError: it is damaged.
    """
    opened = open_linearized(source, method=METHOD, to=TO)
    if opened.kept:
        fact = f"keeps softmax attention in layer {opened.kept[0]}, which {TO} builds otherwise"
        raise PlanError(source.ref, fact, "only a model all of whose layers are linear is exported")
    return opened


def steps(opened: Linearized) -> Iterator[Step]:
    """Yield the copies."""
    names = {str(opened.attention.parts.embedding): "model.embeddings.weight", **OUTSIDE}
    for tensor in opened.outside():
        if tensor.name not in names:
            raise unknown(opened, tensor.name, TO)
        yield copy_as(tensor, names[tensor.name])
    for layer in opened.linear:
        for rest in opened.inside(layer):
            tensor = opened.tensor(layer, rest)
            if rest in NAMES:
                yield copy_as(tensor, f"model.layers.{layer}.{NAMES[rest]}")
            elif rest not in UNUSED:
                raise unknown(opened, tensor.name, TO)


def config(opened: Linearized) -> dict[str, Any]:
    """Return config.json: their names, and every default that the layout depends on."""
    sizes = opened.attention.sizes
    expand = sizes.heads * sizes.head_dim / sizes.hidden
    return {
        "architectures": ["GLAForCausalLM"],
        "model_type": "gla",
        **sizes_of(opened),
        "num_heads": sizes.heads,
        "num_kv_heads": sizes.kv_heads,
        "expand_k": expand,
        "expand_v": expand,
        "hidden_ratio": None,
        "hidden_act": "swish",
        "norm_eps": opened.stock["rms_norm_eps"],
        "elementwise_affine": True,
        "feature_map": None,
        "use_output_gate": True,
        "use_short_conv": False,
        "clamp_min": None,
        "attn": None,
        "attn_mode": "chunk",
        "fuse_norm": True,
        "fuse_swiglu": True,
    }


def notes(_: Linearized) -> tuple[str, ...]:
    """Return what the user should know."""
    return (NOTE,)
