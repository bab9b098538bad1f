"""DELLA: drop small elements more often, elect signs, and merge what agrees."""

from collections.abc import Sequence
from math import prod

from merges.stages.combine import agreed
from merges.stages.layers import added
from merges.stages.parameters import (
    Density,
    Divide,
    Elect,
    Lambda,
    LinesAlpha,
    LinesBeta,
    Normalize,
    Rescale,
    Weight,
    groups,
)
from merges.stages.ranked import Epsilon, by_rank, check_ranks
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
    check=check_ranks,
)
def della(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weight,
    density: Density = 1.0,
    epsilon: Epsilon = 0.15,
    rescale: Rescale = "l1",
    elect: Elect = "weighted",
    divide: Divide = "weights",
    normalize: Normalize = True,
    lambda_: Lambda = 1.0,
    lines_alpha: LinesAlpha = None,
    lines_beta: LinesBeta = None,
    place: Place,
) -> Passes:
    r"""Drop elements at random, small ones more often, rescale, and average what agrees in sign.

    $$p = \rho - \epsilon + 2\epsilon \frac{r}{n - 1}, \quad m_i \sim \mathrm{Bernoulli}(p), \quad
    W = W_0 + \lambda \frac{\sum_{i \in A} w_i \hat\tau_i}{\sum_{i \in A} w_i}$$

    Shapes: all equal, any; ranks are those of magnitudes in a row, all axes behind the first as
    one; a vector is one row. $r$ is a magnitude's place among the $n$ of its row, from 0; equal
    ones share their mean rank. Density 1 keeps all, whatever epsilon.

    Deviation: the authors divide every element by its own probability (rescale: inverse); the
    default keeps each vector's sum of magnitudes, as the recipes expect.

    Raises:
        RecipeError: density +- epsilon not within (0, 1).

    Source: "DELLA-Merging", arXiv 2406.11617, section 3.
    """
    del models
    vectors = by_rank(density, epsilon, inverse=rescale == "inverse")
    if rescale == "l1":
        vectors = yield from rescaled(vectors, rescale, density, prod(base.shape))
    combined = agreed(vectors, weight, normalize=normalize, elect=elect, divide=divide)
    return (
        yield from added(
            combined, scale=lambda_, lines_alpha=lines_alpha, lines_beta=lines_beta, place=place
        )
    )
