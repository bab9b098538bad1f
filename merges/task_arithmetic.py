"""Task arithmetic: add, negate and combine task vectors."""

from collections.abc import Sequence

from merges.stages.combine import summed
from merges.stages.layers import added
from merges.stages.parameters import Lambda, LinesAlpha, LinesBeta, Normalize, Weight, groups
from merges.stages.trim import whole
from merges.stages.weights import check_shares
from surgery.method import Place, Tensor, merge
from surgery.passes import Passes


@merge(
    source="https://arxiv.org/abs/2212.04089",
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
    combined = summed(whole(len(models)), weight, normalize=normalize)
    return (
        yield from added(
            combined, scale=lambda_, lines_alpha=lines_alpha, lines_beta=lines_beta, place=place
        )
    )
