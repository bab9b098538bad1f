"""Geometry on spheres from dot products alone: no vector is ever normalised.

Means, tangents and great circles of a few vectors lie in their span, so that coefficients and
the vectors' Gram matrix say everything. Products are float64.
"""

import math
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

from surgery.method import Tensor
from surgery.passes import Each, Slices

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

    parts: list[Sequence[float]] = yield Each(lambda x: products(told(x)))
    found = np.zeros((count, count))
    for pair, column in zip(_pairs(count), zip(*parts, strict=True), strict=True):
        found[pair] = found[pair[::-1]] = math.fsum(column)
    return found


def products(flat: Sequence[Tensor]) -> list[float]:
    """Return the dot products of slices, each with itself and all behind it."""
    import torch

    wide = [vector.reshape(-1).double() for vector in flat]
    return [float(torch.dot(wide[i], wide[j])) for i, j in _pairs(len(wide))]


def products_along(matrices: Sequence[Tensor], axis: int) -> "Array":
    """Return the same products of the vectors that lie along an axis of matrices.

    Shapes: [rows, columns] each; the result is [pairs, rows] for axis 1, else [pairs, columns].
    """
    import numpy as np

    wide = [matrix.double() for matrix in matrices]
    return np.stack([(wide[i] * wide[j]).sum(axis).numpy() for i, j in _pairs(len(wide))])


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i, count)]


def cosine(dot: "Array", first: "Array", second: "Array") -> "Array":
    """Return cosines from dot products and squared lengths; 0 beside a vector of length 0."""
    import numpy as np

    lengths = np.sqrt(first) * np.sqrt(second)
    found: Array = np.clip(dot / np.where(lengths > 0, lengths, 1.0), -1.0, 1.0)
    return found


def arc(dots: "Array", t: float) -> tuple["Array", "Array"]:
    """Return the factors of two vectors for the point at `t` of the great circle between them.

    Shapes: `dots` is [3, ...], the products 11, 12 and 22; each factor is [...].
    """
    import numpy as np

    cosines = cosine(dots[1], dots[0], dots[2])
    sines = np.sqrt((1 - cosines) * (1 + cosines))
    angle, flat = np.arccos(cosines), sines < FLAT
    under = np.where(flat, 1.0, sines)
    first = np.where(flat, 1 - t, np.sin((1 - t) * angle) / under)
    return first, np.where(flat, t, np.sin(t * angle) / under)
