"""Depth by identity blocks, which change nothing until they are trained (LLaMA-Pro)."""

from growth.depth import DepthMap, change_depth
from growth.residual import identity_writers
from surgery.anatomy import anatomy
from surgery.checkpoint import Checkpoint
from surgery.errors import RecipeError
from surgery.layers.kinds import refuse_recursive
from surgery.plan import Plan


def expand(base: Checkpoint, *, blocks: int) -> Plan:
    """Insert `blocks` copies of layers, spread evenly, that add nothing to the residual stream.

    A new block follows every L/P-th layer and is a copy of it whose output projections (weights
    and biases of attention and feed-forward) are zero. Where P does not divide L, the blocks
    are spread as evenly as whole layers allow. The result computes exactly the same function.

    Raises:
        RecipeError: `blocks` is not within 1 to L.
        PlanError: the architecture's layers cannot be the identity.

    Source: LLaMA Pro, arXiv 2401.02415, section 3.2.
    """
    refuse_recursive(base)
    parts = anatomy(base)
    count = parts.layers
    if not 1 <= blocks <= count:
        fact = f"is outside 1 to {count} for a model of {count} layers"
        raise RecipeError(f"--blocks {blocks}", fact, "one new block may follow each layer")
    after = {(k + 1) * count // blocks - 1 for k in range(blocks)}
    sources = [n for layer in range(count) for n in [layer] * (2 if layer in after else 1)]
    new = [i for i in range(1, len(sources)) if sources[i] == sources[i - 1]]
    zero = {i: identity_writers(base, parts, sources[i]) for i in new}
    return change_depth(
        base,
        DepthMap(sources=tuple(sources), zero=zero),
        operation="expand",
        parameters={"blocks": blocks},
        facts={"trainable_layers": new},
    )
