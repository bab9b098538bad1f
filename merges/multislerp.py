"""Spherical average of any number of models, or of their task vectors."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from merges.stages.blend import blend
from merges.stages.sphere import gram, vectors
from merges.stages.weights import shares
from surgery.method import Param, PerModel, Tensor, merge
from surgery.passes import Passes

if TYPE_CHECKING:
    from merges.stages.sphere import Array

# A mean of unit vectors shorter than this is what rounding left of vectors that cancel.
CANCELLED = 1e-5


def _check(values: Mapping[str, Any]) -> None:
    shares(values["weight"], normalize=values["normalize_weights"])


@merge(source="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea", check=_check)
def multislerp(
    base: Tensor | None,
    models: Sequence[Tensor],
    *,
    weight: Annotated[PerModel[float], Param("share of each model")],
    normalize_weights: Annotated[bool, Param("divide by the sum of the weights")] = True,
    eps: Annotated[float, Param("added to lengths before dividing by them", ge=0)] = 1e-8,
) -> Passes:
    r"""Average directions and lengths apart, each by the weights.

    $$v = \Big(\sum_i w_i \|v_i\|\Big) \frac{m}{\|m\|}, \quad
    m = \sum_i w_i \frac{v_i}{\|v_i\| + \epsilon}$$

    With a base, $v_i = W_i - W_0$ and $W = W_0 + v$; without, $v_i = W_i$ and $W = v$.

    Shapes: equal, any; each tensor is one flat vector. A zero vector has no say in the
    direction. Where the directions cancel ($\|m\|$ below 1e-5, or `eps` if larger), the result is
    the weighted sum $\sum_i w_i v_i$.

    Raises:
        RecipeError: `normalize_weights` with weights that sum to zero.

    Source: mergekit 0.1.5 and its author's post. Both go on to a tangent step at $m/\|m\|$, which
    is zero in exact arithmetic ($\sum_i w_i (u_i - \langle u_i, m \rangle m / \|m\|^2) = m - m$)
    and is left out. mergekit raises an error where the directions of three or more models cancel.
    """
    del base  # a shape only; slices know whether there is one
    dots = yield from gram(vectors, len(models))
    factors = _factors(dots, shares(weight, normalize=normalize_weights), eps)
    return lambda x: blend(vectors(x), factors, start=x.base if x.has_base else None)


def _factors(dots: "Array", weights: Sequence[float], eps: float) -> Sequence[float]:
    import numpy as np

    lengths = np.sqrt(np.diag(dots))
    some = lengths > 0
    mean = np.where(some, weights, 0.0) / np.where(some, lengths + eps, 1.0)
    length = math.sqrt(max(float(mean @ dots @ mean), 0.0))
    if length < max(CANCELLED, eps):
        return weights
    scaled: list[float] = (mean * (lengths @ weights) / length).tolist()
    return scaled
