"""Geometry on spheres from dot products alone: no vector is ever normalised.

Means, tangents and great circles of a few vectors lie in their span, so that coefficients and
the vectors' Gram matrix say everything. The matrix is float64.
"""

import math
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

from surgery.method import Tensor
from surgery.passes import Each, Slices, dots

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[np.float64]]

# Below this sine two vectors count as parallel (the great circle is then a straight line to one
# part in 1e8) or as opposed (no great circle is nearer than another).
FLAT = 1e-4


def vectors(x: Slices) -> Sequence[Tensor]:
    """Return what points from the base to the models; without a base, from zero."""
    return x.deltas if x.has_base else x.models


def gram(told: Callable[[Slices], Sequence[Tensor]], count: int) -> Generator[Each, Any, "Array"]:
    """Ask for the dot products of `count` flat vectors: `yield from gram`; [count, count]."""
    import numpy as np

    parts: list[Sequence[float]] = yield Each(lambda x: dots(told(x)))
    return _square(np.array([math.fsum(column) for column in zip(*parts, strict=True)]), count)


def gram_along(matrices: Sequence[Tensor], axis: int) -> "Array":
    """Return the dot products of the vectors that lie along an axis of matrices.

    Shapes: [rows, columns] each; [count, count, rows] for axis 1, [count, count, columns] for 0.
    """
    import numpy as np
    import torch

    wide = [matrix.double() for matrix in matrices]
    # vecdot is three times as fast along rows, and a third as fast along columns.
    dot = torch.linalg.vecdot if axis else lambda a, b: (a * b).sum(0)
    pairs = [dot(wide[i], wide[j]) for i, j in _pairs(len(wide))]
    return _square(np.stack([pair.numpy() for pair in pairs]), len(wide))


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i, count)]


def _square(pairs: "Array", count: int) -> "Array":
    import numpy as np

    found = np.empty((count, count, *pairs.shape[1:]))
    for (i, j), value in zip(_pairs(count), pairs, strict=True):
        found[i, j] = found[j, i] = value
    return found


def cosines(dots: "Array") -> "Array":
    """Return cosines from dot products [count, count, ...]; 0 beside a vector of length 0."""
    import numpy as np

    lengths = np.sqrt(np.einsum("ii...->i...", dots))
    both = lengths[:, None] * lengths[None]
    found: Array = np.clip(dots / np.where(both > 0, both, 1.0), -1.0, 1.0)
    return found


def arc(dots: "Array", t: float) -> tuple["Array", "Array"]:
    """Return the factors of two vectors for the point at `t` of the great circle between them.

    Shapes: `dots` is [2, 2, ...]; each factor is [...].
    """
    import numpy as np

    cosine = cosines(dots)[0, 1]
    sine = np.sqrt((1 - cosine) * (1 + cosine))
    angle, flat = np.arccos(cosine), sine < FLAT
    under = np.where(flat, 1.0, sine)
    first = np.where(flat, 1 - t, np.sin((1 - t) * angle) / under)
    return first, np.where(flat, t, np.sin(t * angle) / under)
