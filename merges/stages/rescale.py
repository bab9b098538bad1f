"""Make up for what was trimmed, by one factor per task vector."""

from collections.abc import Generator, Sequence
from dataclasses import replace
from math import fsum
from typing import Any

from merges.stages.floats import Array, delta, deltas, sum_of
from merges.stages.masks import Draw, by_masks
from merges.stages.trim import Trimming, Vectors, masked
from surgery.passes import Each, Slices, total

HELD = 1 << 27  # elements of masks that are kept until the tensor is written: 16 MiB


def rescaled(vectors: Vectors, how: str, density: Sequence[float], numel: int) -> Trimming:
    """Make up for what was dropped.

    Args:
        vectors: trimmed.
        how: "l1" keeps each vector's sum of magnitudes; "inverse" divides by the density, which
            keeps the expected value of what is dropped at random; "none".
        density: per model; where it is 1 or 0, the factor is 1.
        numel: elements of the tensor.
    """
    partly = [n for n, share in enumerate(density) if 0 < share < 1]
    if how == "none" or not partly:
        return vectors
    factors = list(vectors.factors)
    if how == "inverse":
        for model in partly:
            factors[model] = 1 / density[model]
        return replace(vectors, factors=tuple(factors))
    if vectors.draw and numel * len(partly) <= HELD:
        vectors, sums = yield from _drawn_once(vectors, vectors.draw)
    else:
        sums = yield from total(lambda x: _sums(x, vectors))
    for model in partly:
        before, after = sums[2 * model : 2 * model + 2]
        factors[model] = before / after if after else 1.0
    return replace(vectors, factors=tuple(factors))


def _sums(x: Slices, vectors: Vectors) -> list[float]:
    """Return per model the sums of magnitudes before and after trimming."""
    pairs = zip(deltas(x), vectors.slices(x), strict=True)
    return [_l1(vector) for pair in pairs for vector in pair]


def _l1(vector: Array) -> float:
    """Return the sum of magnitudes, taken in place."""
    import numpy as np

    return sum_of(np.abs(vector, out=vector))


def _drawn_once(vectors: Vectors, draw: Draw) -> Generator[Each, Any, tuple[Vectors, list[float]]]:
    """Return the sums, and vectors whose masks are remembered."""
    import numpy as np

    def look(x: Slices) -> tuple[list[float], dict[int, Array]]:
        sums, masks = [0.0, 0.0] * len(x.models), {}
        for model in vectors.drawn:
            values = delta(x, model)
            sums[2 * model] = _l1(values)
            mask = draw(x, model, values)
            masks[model] = np.packbits(mask)
            sums[2 * model + 1] = sum_of(masked(values, mask))
        return sums, masks

    def recall(x: Slices, model: int, _: Array) -> Array:
        return np.unpackbits(found[x.part.index][1][model], count=x.part.count).view(bool)

    found = yield Each(look)
    sums = [fsum(column) for column in zip(*(part for part, _ in found), strict=True)]
    return by_masks(recall, vectors.drawn, len(vectors.factors)), sums
