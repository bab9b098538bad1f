"""DARE with sign election: drop at random, rescale, and merge what agrees."""

from collections.abc import Sequence
from math import prod

from merges.stages.combine import agreed
from merges.stages.layers import added
from merges.stages.masks import at_random
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
from merges.stages.rescale import rescaled
from surgery.method import Place, Tensor, merge
from surgery.passes import Passes


@merge(
    source="https://arxiv.org/abs/2311.03099",
    plain=True,
    ignored=("int8_mask",),
    is_random=True,
    groups=groups,
)
def dare_ties(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weight,
    density: Density = 1.0,
    rescale: Rescale = "l1",
    elect: Elect = "weighted",
    divide: Divide = "weights",
    normalize: Normalize = False,
    lambda_: Lambda = 1.0,
    lines_alpha: LinesAlpha = None,
    lines_beta: LinesBeta = None,
    place: Place,
) -> Passes:
    r"""Drop elements of every task vector at random, rescale, elect signs, and add up what agrees.

    $$W = W_0 + \lambda \sum_{i \in A} w_i \hat\tau_i, \quad
    \hat\tau_i = \frac{m_i \odot (W_i - W_0)}{r_i}, \quad
    A = \{i : \mathrm{sign}(w_i \hat\tau_i) = \mathrm{sign} \sum_j w_j \hat\tau_j\}$$

    Shapes: all equal, any. The seed, the tensor's name and the model's place decide what is
    dropped.

    Deviation: the paper divides by the density (rescale: inverse), which keeps the expected
    value; the default keeps each vector's sum of magnitudes, as the recipes expect.

    Source: "Language models are super Mario", arXiv 2311.03099, section 3; signs as in TIES,
    arXiv 2306.01708.
    """
    vectors = yield from rescaled(at_random(density), rescale, density, prod(base.shape))
    del models
    combined = agreed(vectors, weight, normalize=normalize, elect=elect, divide=divide)
    return (
        yield from added(
            combined, scale=lambda_, lines_alpha=lines_alpha, lines_beta=lines_beta, place=place
        )
    )
