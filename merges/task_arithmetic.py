"""Task arithmetic: add, negate and combine task vectors."""

from collections.abc import Mapping, Sequence
from typing import Any

from merges.stages.combine import summed
from merges.stages.layers import added, given_line
from merges.stages.parameters import Lambda, LinesAlpha, LinesBeta, Normalize, Weight, groups
from merges.stages.trim import whole
from merges.stages.weights import check_shares, shares
from surgery.method import Place, Tensor, merge
from surgery.passes import Passes, Slices


def _knows_its_scale(values: Mapping[str, Any]) -> bool:
    """Whether nothing must be measured first."""
    return values["lines_beta"] is None or values["lines_alpha"] is not None


@merge(
    source="https://arxiv.org/abs/2212.04089",
    plain=_knows_its_scale,
    ignored=("density", "rescale", "int8_mask"),
    groups=groups,
    check=check_shares,
)
def task_arithmetic(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weight,
    normalize: Normalize = False,
    lambda_: Lambda = 1.0,
    lines_alpha: LinesAlpha = None,
    lines_beta: LinesBeta = None,
    place: Place,
) -> Passes:
    r"""Add task vectors to the base, each by its weight; a negative one takes away.

    $$W = W_0 + \lambda \sum_i w_i (W_i - W_0)$$

    Shapes: all equal, any.

    Raises:
        RecipeError: `normalize` with weights that sum to zero.

    Source: "Editing models with task arithmetic", arXiv 2212.04089, section 2.
    """
    del base  # its shape does not matter
    if lines_beta is None or lines_alpha is not None:
        alpha, beta = given_line(lines_alpha, lines_beta)
        factor = lambda_ * (alpha + beta * (place.depth or 0.0))
        factors = [-factor * share for share in shares(weight, normalize=normalize)]
        return lambda x: _added(x, factors)
    combined = summed(whole(len(models)), weight, normalize=normalize)
    line = {"lines_alpha": lines_alpha, "lines_beta": lines_beta}
    return (yield from added(combined, scale=lambda_, place=place, **line))


def _added(x: Slices, factors: Sequence[float]) -> Tensor:
    """Subtract the negative: minus plus zero leaves -0.0 in the base as it is."""
    first, *others = x.models
    result = first - x.base
    result *= factors[0]
    for model, factor in zip(others, factors[1:], strict=True):
        delta = model - x.base
        delta *= factor
        result += delta
    result += 0.0
    return x.base - result
