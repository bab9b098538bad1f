"""Bring back a de-coalesced model: W <- (1 - alpha) W + alpha W_decoalesced."""

from collections.abc import Callable
from functools import partial
from typing import Any

from growth.depth import SCALABLE
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.errors import PlanError, RecipeError
from surgery.plan import Plan, Step, TensorSpec, check_plan


def interpolate(model: Checkpoint, decoalesced: Checkpoint, *, alpha: float = 0.25) -> Plan:
    """Move every tensor of a model a share of the way to a de-coalesced one of the same sizes.

    Args:
        model: as it was before it was coalesced; config and files are its own.
        alpha: share of the de-coalesced weights, from 0 to 1.

    Raises:
        RecipeError: alpha is outside 0 to 1, or the two are not of the same sizes.

    Source: arXiv 2404.07999, section 3.3.
    """
    if not 0 <= alpha <= 1:
        raise RecipeError(f"--alpha {alpha:g}", "is outside 0 to 1", "the paper took 0.25")
    for here, there in ((model, decoalesced), (decoalesced, model)):
        lost = next((name for name in here.tensors if name not in there.tensors), None)
        if lost is not None:
            fact = f"has no tensor {lost!r}, which {here.ref} has"
            raise RecipeError(there.ref, fact, "de-coalesce with --like that model")
    steps = [_step(t, decoalesced.tensors[n], alpha) for n, t in model.tensors.items()]
    return check_plan(
        Plan(
            operation="interpolate",
            parameters={"alpha": alpha},
            sources=(model, decoalesced),
            steps=tuple(steps),
            order=tuple(model.tensors),
            config=None if model.config is None else dict(model.config),
            carried=model.carried,
            notes=model.notes,
        )
    )


def _step(own: TensorInfo, other: TensorInfo, alpha: float) -> Step:
    if own.shape != other.shape:
        fact = f"has shape {list(own.shape)}, and {list(other.shape)} in the other model"
        raise RecipeError(own.name, fact, "de-coalesce with --like the model itself")
    odd = next((t for t in (own, other) if t.dtype not in SCALABLE), None)
    if odd is not None:
        fact = f"is stored as {odd.dtype}, which is not computed with"
        raise PlanError(odd.name, fact, "dequantise the checkpoint first")
    fn: Callable[..., Any] = partial(_between, alpha=alpha)
    return Step(
        inputs=(own, other),
        outputs=((own.name, TensorSpec(own.dtype, own.shape)),),
        fn=fn,
        elementwise=True,
        plain=not any(hasattr(tensor, "make") for tensor in (own, other)),
        why=f"move by {alpha:g}",
    )


def _between(own: Any, other: Any, *, alpha: float) -> Any:  # noqa: ANN401 - torch or numpy
    return own * (1 - alpha) + other * alpha
