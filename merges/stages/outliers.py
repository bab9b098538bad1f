"""Trim task vectors of their largest and their smallest magnitudes (breadcrumbs)."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Annotated, Any, Literal

from merges.stages.floats import Array, deltas
from merges.stages.selection import largest
from merges.stages.trim import Trimming, Vectors, magnitudes, masked
from surgery.method import Param, PerModel, Tensor
from surgery.passes import Slices

Gamma = Annotated[
    PerModel[float], Param("fraction of the largest elements, which are dropped", ge=0, le=1)
]
Scope = Annotated[
    Literal["tensor", "row"], Param("of what density and gamma are fractions: tensor or each row")
]


def by_rows(values: Mapping[str, Any]) -> bool:
    """Whether whole rows are wanted."""
    return values.get("scope") == "row"


def without_outliers(
    base: Tensor, density: Sequence[float], gamma: Sequence[float], *, scope: str
) -> Trimming:
    """Drop the largest magnitudes of every task vector, keep the next, drop the rest.

    Args:
        base: tells the shape.
        density: the share kept, per model; it wins where the two do not fit together.
        gamma: the share of the largest, which are dropped, per model.
        scope: whether shares are of the "tensor" or of each "row".
    """
    import numpy as np

    numel = prod(base.shape)
    if scope == "row":
        return _of_rows(_counts(density, gamma, prod(base.shape[len(base.shape) > 1 :])))
    counts = _counts(density, gamma, numel)
    partly = [n for n, row in enumerate(counts) if any(0 < k < numel for k in row)]
    cuts = yield from largest(magnitudes(partly), counts, numel)

    def trimmed(x: Slices) -> list[Array]:
        found = deltas(x)
        for vector, (top, bottom) in zip(found, cuts, strict=True):
            values = np.abs(vector)
            mask = bottom.keep(values, x.part)
            masked(vector, np.greater(mask, top.keep(values, x.part), out=mask))
        return found

    return Vectors(trimmed, (1.0,) * len(density))


def _counts(density: Sequence[float], gamma: Sequence[float], numel: int) -> list[list[int]]:
    """Return per model how many of the largest are dropped, and how many those and the kept are."""
    counts = []
    for share, outliers in zip(density, gamma, strict=True):
        kept = int(share * numel)
        top = min(int(outliers * numel), numel - kept)
        counts.append([top, top + kept])
    return counts


def _of_rows(counts: Sequence[Sequence[int]]) -> Vectors:
    import numpy as np

    def trimmed(x: Slices) -> list[Array]:
        found = deltas(x)
        for vector, (top, bottom) in zip(found, counts, strict=True):
            values = np.abs(vector)
            masked(vector, first_of_rows(values, bottom) & ~first_of_rows(values, top))
        return found

    return Vectors(trimmed, (1.0,) * len(counts))


def first_of_rows(values: Array, count: int) -> Array:
    """Return the mask of the `count` largest of every row; of equals, the first ones.

    Shapes: [rows, columns] to the same; flat values are one row.
    """
    import numpy as np

    rows = values.reshape(-1, values.shape[-1])
    if count in {0, rows.shape[1]}:
        return np.full(values.shape, count > 0)
    place = rows.shape[1] - count
    edge = np.sort(rows, axis=1)[:, place : place + 1]
    above, equal = rows > edge, rows == edge
    room = count - above.sum(axis=1, keepdims=True)
    if (equal.sum(axis=1, keepdims=True) != room).any():
        equal &= np.cumsum(equal, axis=1) <= room
    return (above | equal).reshape(values.shape)
