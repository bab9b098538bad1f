"""Karcher mean: the point of a sphere with the least squared distance to several models."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from merges.stages.blend import blend
from merges.stages.sphere import FLAT, gram
from merges.stages.weights import shares
from surgery.method import Param, PerModel, Tensor, merge
from surgery.passes import Passes

if TYPE_CHECKING:
    from merges.stages.sphere import Array


def _check(values: Mapping[str, Any]) -> None:
    shares(values["weight"], normalize=True)


@merge(source="https://arxiv.org/abs/2603.04972", check=_check)
def karcher(
    models: Sequence[Tensor],
    *,
    weight: Annotated[PerModel[float], Param("share of each model", ge=0)] = 1.0,
    max_iter: Annotated[int, Param("steps at most", ge=1)] = 10,
    tol: Annotated[float, Param("angle that ends the search, in radians", gt=0)] = 1e-5,
) -> Passes:
    r"""Average directions on the sphere, and lengths apart.

    $$W = \Big(\sum_i a_i \|W_i\|\Big)\, m, \quad
    m \leftarrow \exp_m\Big(\sum_i a_i \log_m \frac{W_i}{\|W_i\|}\Big)$$

    from the normalised mean of the directions on, until the step is shorter than `tol`; $a_i$
    are the weights divided by their sum.

    Shapes: equal, any; each tensor is one flat vector. A zero tensor counts for the length, not
    for the direction. Where the directions cancel, the search starts at the first of them; a
    direction opposed to the mean (sine below 1e-4) does not pull, as no way is shorter.

    Raises:
        RecipeError: the weights sum to zero.

    Source: arXiv 2603.04972; mergekit 0.1.5, which has no weights, leaves out tensors shorter
    than `tol` and gives noise for opposed ones. The search runs on coefficients: a mean of k
    vectors lies in their span, so that their Gram matrix, one pass, is all it needs.
    """
    dots = yield from gram(lambda x: x.models, len(models))
    factors = _factors(dots, shares(weight, normalize=True), max_iter, tol)
    return lambda x: blend(x.models, factors)


def _factors(dots: "Array", weights: Sequence[float], steps: int, tol: float) -> list[float]:
    """Return what multiplies each model."""
    import numpy as np

    lengths = np.sqrt(np.diag(dots))
    some = lengths > 0
    pull = np.where(some, weights, 0.0)
    if not pull.any():
        return [0.0] * len(weights)
    inverse = np.where(some, 1 / np.where(some, lengths, 1.0), 0.0)
    mean = _mean(dots * np.outer(inverse, inverse), pull / pull.sum(), steps, tol)
    scaled: list[float] = (mean * inverse * (lengths @ weights)).tolist()
    return scaled


def _mean(cosines: "Array", pull: "Array", steps: int, tol: float) -> "Array":
    """Return the coefficients of the mean of unit vectors with these cosines."""
    import numpy as np

    mean = pull
    if _length(mean, cosines) < tol:
        mean = np.eye(len(pull))[np.flatnonzero(pull)[0]]
    mean = mean / _length(mean, cosines)
    for _ in range(steps):
        tangent = _pull(mean, cosines, pull, tol)
        angle = _length(tangent, cosines)
        if angle < tol:
            break
        mean = np.cos(angle) * mean + np.sin(angle) / angle * tangent
        mean = mean / _length(mean, cosines)
    return mean


def _pull(mean: "Array", cosines: "Array", pull: "Array", tol: float) -> "Array":
    """Return the coefficients of the weighted sum of the tangents towards each vector."""
    import numpy as np

    ahead = np.clip(cosines @ mean, -1.0, 1.0)
    angle, sine = np.arccos(ahead), np.sqrt((1 - ahead) * (1 + ahead))
    apart = (angle >= tol) & ((sine >= FLAT) | (ahead > 0))
    share = np.where(apart, pull * angle / np.where(apart, sine, 1.0), 0.0)
    found: Array = share - (share @ ahead) * mean
    return found


def _length(coefficients: "Array", cosines: "Array") -> float:
    return math.sqrt(max(float(coefficients @ cosines @ coefficients), 0.0))
