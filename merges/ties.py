"""TIES: trim, elect signs, and merge what agrees."""

from collections.abc import Sequence
from math import prod
from typing import Annotated, Literal

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
from merges.stages.rescale import rescaled
from merges.stages.trim import by_magnitude
from surgery.method import Param, Place, Tensor, merge
from surgery.passes import Passes


@merge(source="https://arxiv.org/abs/2306.01708", plain=True, ignored=("int8_mask",), groups=groups)
def ties(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weight,
    density: Density = 1.0,
    scope: Annotated[
        Literal["tensor", "model"], Param("of what density is the fraction: each tensor or all")
    ] = "tensor",
    rescale: Rescale = "none",
    elect: Elect = "weighted",
    divide: Divide = "weights",
    normalize: Normalize = True,
    lambda_: Lambda = 1.0,
    lines_alpha: LinesAlpha = None,
    lines_beta: LinesBeta = None,
    place: Place,
) -> Passes:
    r"""Trim task vectors, elect a sign for every element, and average those that have it.

    $$W = W_0 + \lambda \frac{\sum_{i \in A} w_i \hat\tau_i}{\sum_{i \in A} w_i}, \quad
    A = \{i : \mathrm{sign}(w_i \hat\tau_i) = s\}, \quad
    s = \mathrm{sign} \sum_i w_i \hat\tau_i$$

    Shapes: all equal, any. The vector $\hat\tau_i$ keeps the `density` largest magnitudes of
    $W_i - W_0$, the lower index first where they are equal. A draw elects plus; a vote within
    2e-6 of one is a draw. Weights that sum to zero divide nothing.

    Deviations: the paper trims over the whole model (scope: model), votes without weights
    (elect: raw), divides by the number of agreeing models (divide: count), and lets a draw go
    the way of the model's majority; the defaults are those recipes are written for.

    Source: "TIES-Merging", arXiv 2306.01708, section 3, algorithm 1.
    """
    vectors = yield from by_magnitude(density, prod(base.shape), scope=scope)
    vectors = yield from rescaled(vectors, rescale, density, prod(base.shape))
    del models
    combined = agreed(vectors, weight, normalize=normalize, elect=elect, divide=divide)
    return (
        yield from added(
            combined, scale=lambda_, lines_alpha=lines_alpha, lines_beta=lines_beta, place=place
        )
    )
