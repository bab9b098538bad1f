"""DARE: drop at random, rescale, and add up."""

from collections.abc import Sequence
from math import prod

from merges.stages.combine import summed
from merges.stages.layers import added
from merges.stages.masks import at_random
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
from merges.stages.rescale import rescaled
from merges.stages.weights import check_shares
from surgery.method import Place, Tensor, merge
from surgery.passes import Passes


@merge(
    source="https://arxiv.org/abs/2311.03099",
    plain=True,
    ignored=("int8_mask",),
    is_random=True,
    groups=groups,
    check=check_shares,
)
def dare_linear(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weight,
    density: Density = 1.0,
    rescale: Rescale = "l1",
    normalize: Normalize = False,
    lambda_: Lambda = 1.0,
    lines_alpha: LinesAlpha = None,
    lines_beta: LinesBeta = None,
    place: Place,
) -> Passes:
    r"""Drop elements of every task vector at random, rescale the others, and add the vectors up.

    $$W = W_0 + \lambda \sum_i w_i \frac{m_i \odot (W_i - W_0)}{r_i}, \quad
    m_i \sim \mathrm{Bernoulli}(p_i)$$

    Shapes: all equal, any. The seed, the tensor's name and the model's place decide what is
    dropped.

    Deviation: the paper divides by the density (rescale: inverse), which keeps the expected
    value; the default keeps each vector's sum of magnitudes, as the recipes expect.

    Raises:
        RecipeError: `normalize` with weights that sum to zero.

    Source: "Language models are super Mario", arXiv 2311.03099, section 3.
    """
    vectors = yield from rescaled(at_random(density), rescale, density, prod(base.shape))
    del models
    combined = summed(vectors, weight, normalize=normalize)
    return (
        yield from added(
            combined, scale=lambda_, lines_alpha=lines_alpha, lines_beta=lines_beta, place=place
        )
    )
