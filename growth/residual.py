"""Which weights of a layer write to the residual stream: zero them and the layer is identity."""

import re

from surgery.anatomy import Anatomy
from surgery.checkpoint import Checkpoint
from surgery.errors import PlanError

# Last projection of attention and of the feed-forward part, in the names of the families.
ATTENTION = re.compile(
    r"(^|\.)(o_proj|out_proj|wo|attn\.c_proj|attention\.dense|self_attention\.dense|self_attn\.dense|attn_out"
    r"|attention\.output\.dense)(\.|$|_)"
)
FEED_FORWARD = re.compile(
    r"(^|\.)(down_proj|w2|fc2|fc_out|mlp\.c_proj|dense_4h_to_h|ffn\.out_proj|linear_2"
    r"|ff_out)(\.|$|_)"
)
# A norm after the sum changes the stream even when the layer adds nothing.
NORM_AFTER_SUM = re.compile(r"(^|\.)output\.LayerNorm\.")
PACKED = ("gptq", "awq", "bitsandbytes", "hqq", "aqlm", "quip")


def residual_writers(base: Checkpoint, parts: Anatomy) -> frozenset[str]:
    """Return names within a layer, biases included, whose zeros make the layer the identity.

    Raises:
        PlanError: the layer normalises after its sums, is stored in a packed form whose zeros
            are not zero, or has no weights that are known to write to the stream.
    """
    names = {rest for layer in parts.stack.layers.values() for rest in layer}
    place = f"{base.name} ({parts.family})"
    if any(NORM_AFTER_SUM.search(name) for name in names):
        fact = "normalises after each residual sum, so no layer of it can be the identity"
        raise PlanError(place, fact, "use `surgery stack` instead")
    method = str(((base.config or {}).get("quantization_config") or {}).get("quant_method", ""))
    if method in PACKED:
        fact = f"is quantised with {method}, where zero bytes are not zero weights"
        raise PlanError(place, fact, "start from the unquantised checkpoint")
    attention = {name for name in names if ATTENTION.search(name)}
    feed_forward = {name for name in names if FEED_FORWARD.search(name)}
    if not attention or not feed_forward:
        kind = "attention" if not attention else "feed-forward"
        fact = f"has no {kind} projection by a known name (o_proj, down_proj, c_proj, ...)"
        raise PlanError(place, fact, "this architecture is not supported")
    return frozenset(attention | feed_forward)
