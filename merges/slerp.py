"""Spherical interpolation between two models."""

import math
from typing import Annotated

from merges.stages.blend import blended
from surgery.method import Param, Tensor, merge
from surgery.passes import Passes, dots, total

PARALLEL = 0.9995  # cosines beyond this interpolate linearly
SMALLEST = 1e-8  # a shorter vector is left unscaled, as one of length 1


@merge(source="https://dl.acm.org/doi/10.1145/325334.325242", plain=True)
def slerp(
    base: Tensor,
    other: Tensor,
    *,
    t: Annotated[float, Param("0 is the base, 1 the other model", ge=0, le=1)],
) -> Passes:
    r"""Interpolate along the great circle between two models, norms included.

    $$W = \frac{\sin((1-t)\theta)\,W_0 + \sin(t\theta)\,W_1}{\sin\theta}, \quad
    \cos\theta = \langle u_0, u_1 \rangle$$

    Shapes: equal, any; each tensor is one flat vector, u its direction. Interpolates linearly
    where the two are nearly parallel or opposed (|cos| > 0.9995).

    Source: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985.
    """
    del base, other  # shapes only; every pass sees slices
    aa, ab, bb = yield from total(lambda x: dots([x.base, x.models[0]]))
    cosine = ab / (_length(aa) * _length(bb))
    first, second = _factors(max(-1.0, min(1.0, cosine)), t)
    return lambda x: blended((x.base, x.models[0]), (first, second))


def _length(square: float) -> float:
    length = math.sqrt(square)
    return length if length > SMALLEST else 1.0


def _factors(cosine: float, t: float) -> tuple[float, float]:
    if abs(cosine) > PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
