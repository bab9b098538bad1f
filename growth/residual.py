"""Which weights of a layer write to the residual stream: zero them and the layer is identity."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from surgery.anatomy import Anatomy
from surgery.checkpoint import Checkpoint
from surgery.errors import PlanError

# Last projection of a branch (attention, state space, feed-forward), in the names of the families.
WRITER = re.compile(
    r"(^|\.)(o_proj|out_proj|wo|Wo|attn\.c_proj|(self_)?attention\.dense|self_attn\.dense|attn_out"
    r"|attention\.output\.dense|attention_out|linear_out"
    r"|down_proj|w2|fc2|fc_out|mlp\.c_proj|dense_4h_to_h|ffn\.out_proj|linear_2|ff_out|w_out"
    r"|(block_sparse_moe|shared_mlp)\.output_linear)(\.|$|_)"
)
FEEDS = {"fc1", "fc_in", "linear_1"}  # lies beside its writer, not in one module with it
# Of a factored map one factor is zeroed: with both at zero neither would get a gradient.
KEPT = (".factor_A", ".sparse_places")
# A norm after the sum changes the stream even when the layer adds nothing; so does a factor.
NORM_AFTER_SUM = re.compile(r"(^|\.)output\.LayerNorm\.")
CHANGES_STREAM = re.compile(r"residual|layer_scalar|(^|[._])hc([._]|$)")
PACKED = ("gptq", "awq", "bitsandbytes", "hqq", "aqlm", "quip")
# Families whose names look like others', but whose layers keep no stream unchanged.
AFTER_SUM = "normalises after each residual sum"
FAMILIES: Mapping[str, str] = {
    "longcat_flash": "has experts that pass their input on",
    "openai-gpt": AFTER_SUM,
    "trocr": AFTER_SUM,
}
SETTINGS: tuple[tuple[str, bool], ...] = (
    ("do_layer_norm_before", False),
    ("apply_residual_connection_post_layernorm", True),
)


def writers_among(names: Iterable[str]) -> frozenset[str]:
    """Return the names within a layer, biases included, of weights that write to the stream."""
    return frozenset(name for name in names if WRITER.search(name) and not name.endswith(KEPT))


def identity_writers(base: Checkpoint, parts: Anatomy, layer: int) -> frozenset[str]:
    """Return names within a layer, biases included, whose zeros make the layer the identity.

    Raises:
        PlanError: the layer changes the stream in another way, is stored in a packed form whose
            zeros are not zero, or has a branch whose last projection is not known.
    """
    names = parts.stack.layers[layer]
    place = f"{base.name} ({parts.family})"
    why = _other_change(base.config or {}, parts, names)
    if why:
        fact = f"{why}, so no layer of it can be the identity"
        raise PlanError(place, fact, "use `surgery stack` instead")
    writers = writers_among(names)
    silent = _silent_branch(base, parts, layer, writers)
    if silent or not writers:
        fact = f"layer {layer} has no last projection by a known name in {silent or 'it'}"
        raise PlanError(place, fact, "this architecture is not supported by expand")
    return writers


def _other_change(config: Mapping[str, Any], parts: Anatomy, names: Iterable[str]) -> str | None:
    """Say how layers change the stream other than by what their writers add."""
    text: Any = config
    for key in parts.section:
        text = text[key]
    family = str(text.get("model_type", parts.family))
    if family in FAMILIES:
        return FAMILIES[family]
    if any(NORM_AFTER_SUM.search(name) for name in names):
        return AFTER_SUM
    setting = next((key for key, value in SETTINGS if text.get(key) is value), None)
    if setting:
        return f"has {setting} = {text[setting]}"
    found = next((name for name in names if CHANGES_STREAM.search(name)), None)
    if found:
        return f"multiplies or mixes the residual stream ({found})"
    method = str((config.get("quantization_config") or {}).get("quant_method", ""))
    if method in PACKED:
        return f"is quantised with {method}, where zero bytes are not zero weights"
    return None


def _silent_branch(
    base: Checkpoint, parts: Anatomy, layer: int, writers: Iterable[str]
) -> str | None:
    """Return a module of the layer that holds matrices, but none that is known to write."""
    heard = {name.partition(".")[0] for name in writers} | FEEDS
    tensors = ((n, base.tensors[parts.stack.name(layer, n)]) for n in parts.stack.layers[layer])
    modules = (name.partition(".")[0] for name, tensor in tensors if len(tensor.shape) > 1)
    return next((module for module in modules if module not in heard), None)
