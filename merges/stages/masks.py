"""Trim task vectors by masks drawn at random."""

from collections.abc import Callable, Sequence

from merges.stages.floats import Array, deltas
from merges.stages.trim import Vectors, masked
from surgery.passes import Slices

Draw = Callable[[Slices, int, Array], Array]


def at_random(density: Sequence[float]) -> Vectors:
    """Keep every element with the same probability: where its 32 random bits are below it.

    The first eight decide, but for one element in 256, where they equal the probability's.
    """
    below = [min(round(share * 2**32), 2**32 - 1) for share in density]

    def draw(x: Slices, model: int, _: Array) -> Array:
        import numpy as np

        first, rest = divmod(below[model], 1 << 24)
        drawn = x.bits(model, kind="uint8")
        mask = drawn < np.uint8(first)
        if rest:
            edge = np.flatnonzero(drawn == np.uint8(first))
            more = x.bits(model, stream=1, count=len(edge)) >> np.uint32(8)
            mask[edge] = more < np.uint32(rest)
        return mask

    return by_masks(draw, [n for n, share in enumerate(density) if share < 1], len(density))


def by_masks(draw: Draw, drawn: Sequence[int], count: int) -> Vectors:
    """Return `count` task vectors, those whose masks are drawn multiplied by them."""

    def trimmed(x: Slices) -> list[Array]:
        found = deltas(x)
        for model in drawn:
            masked(found[model], draw(x, model, found[model]))
        return found

    return Vectors(trimmed, (1.0,) * count, draw, tuple(drawn))
