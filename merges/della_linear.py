"""DELLA without sign election: drop small elements more often, and add up."""

from collections.abc import Sequence
from math import prod

from merges.stages.combine import summed
from merges.stages.layers import added
from merges.stages.parameters import (
    Density,
    Lambda,
    LinesAlpha,
    LinesBeta,
    Normalize,
    Rescale,
    Weight,
    groups,
)
from merges.stages.ranked import Epsilon, by_rank, check_ranks_and_shares
from merges.stages.rescale import rescaled
from surgery.method import Place, Tensor, merge
from surgery.passes import Passes


@merge(
    source="https://arxiv.org/abs/2406.11617",
    plain=True,
    rows=True,
    ignored=("int8_mask",),
    is_random=True,
    groups=groups,
    check=check_ranks_and_shares,
)
def della_linear(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weight,
    density: Density = 1.0,
    epsilon: Epsilon = 0.15,
    rescale: Rescale = "l1",
    normalize: Normalize = False,
    lambda_: Lambda = 1.0,
    lines_alpha: LinesAlpha = None,
    lines_beta: LinesBeta = None,
    place: Place,
) -> Passes:
    r"""Drop elements at random, small ones more often, rescale the others, and add the vectors up.

    $$p = \rho - \epsilon + 2\epsilon \frac{r}{n - 1}, \quad m_i \sim \mathrm{Bernoulli}(p), \quad
    W = W_0 + \lambda \sum_i w_i \frac{m_i \odot (W_i - W_0)}{r_i}$$

    Shapes: all equal, any; ranks are those of magnitudes in a row, all axes behind the first as
    one; a vector is one row. $r$ is a magnitude's place among the $n$ of its row, from 0; equal
    ones share their mean rank. Density 1 keeps all, whatever epsilon.

    Deviation: the authors divide every element by its own probability (rescale: inverse); the
    default keeps each vector's sum of magnitudes, as the recipes expect.

    Raises:
        RecipeError: density +- epsilon not within (0, 1), or `normalize` with weights that
            sum to zero.

    Source: "DELLA-Merging", arXiv 2406.11617, section 3.
    """
    del models
    vectors = by_rank(density, epsilon, inverse=rescale == "inverse")
    if rescale == "l1":
        vectors = yield from rescaled(vectors, rescale, density, prod(base.shape))
    combined = summed(vectors, weight, normalize=normalize)
    return (
        yield from added(
            combined, scale=lambda_, lines_alpha=lines_alpha, lines_beta=lines_beta, place=place
        )
    )
