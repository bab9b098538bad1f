"""Make up for what was trimmed, by one factor per task vector."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from math import fsum
from typing import Any

from merges.stages.masks import Draw, by_masks
from merges.stages.trim import Trimming, Vectors
from surgery.passes import Each, Slices, total

Array = Any  # a numpy array
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
    before = [float(delta.abs().sum()) for delta in x.deltas]
    after = [float(vector.abs_().sum()) for vector in vectors.slices(x)]
    return [number for pair in zip(before, after, strict=True) for number in pair]


def _drawn_once(vectors: Vectors, draw: Draw) -> Generator[Each, Any, tuple[Vectors, list[float]]]:
    """Return the sums, and vectors whose masks are remembered."""
    import numpy as np

    def look(x: Slices) -> tuple[list[float], dict[int, Array]]:
        masks = {model: np.packbits(draw(x, model)) for model in vectors.drawn}
        return _sums(x, remembered(lambda _: masks)), masks

    def remembered(masks_of: Callable[[Slices], dict[int, Array]]) -> Vectors:
        def recall(x: Slices, model: int) -> Array:
            return np.unpackbits(masks_of(x)[model], count=x.part.count).view(bool)

        return by_masks(recall, vectors.drawn, len(vectors.factors))

    found = yield Each(look)
    sums = [fsum(column) for column in zip(*(part for part, _ in found), strict=True)]
    return remembered(lambda x: found[x.part.index][1]), sums
