"""Trim task vectors: keep the largest elements of each.

Dropped elements are multiplied by zero, so that NaN stays and the engine names it.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from merges.stages.floats import Array, delta, deltas
from merges.stages.selection import Cut, largest, largest_of_all
from surgery.passes import Each, Slices
from surgery.plan import Part


@dataclass(frozen=True, slots=True)
class Vectors:
    """Task vectors, trimmed.

    Attributes:
        slices: gives fresh arrays of them, to be changed in place.
        factors: what each is still to be multiplied by.
        draw: where they are trimmed by masks drawn at random, gives the mask of a model's slice,
            told the slice, or its magnitudes.
        drawn: the models of which masks are drawn.
    """

    slices: Callable[[Slices], list[Array]]
    factors: tuple[float, ...]
    draw: Callable[[Slices, int, Array], Array] | None = None
    drawn: tuple[int, ...] = ()


Trimming = Generator[Each, Any, Vectors]


def whole(models: int) -> Vectors:
    """Return task vectors as they are."""
    return Vectors(deltas, (1.0,) * models)


def by_magnitude(density: Sequence[float], numel: int, *, scope: str = "tensor") -> Trimming:
    """Keep the largest magnitudes of every task vector, at least one where any.

    Args:
        density: the share kept, per model.
        numel: elements of the tensor.
        scope: whether the share is of each "tensor" or of the whole "model".
    """
    if scope == "model":
        values = magnitudes(range(len(density)))
        cuts = yield from largest_of_all(values, [[d] for d in density], numel, group="trim")
    else:
        counts = [[kept_number(d, numel)] for d in density]
        partly = [n for n, (count,) in enumerate(counts) if 0 < count < numel]
        cuts = yield from largest(magnitudes(partly), counts, numel)

    def trimmed(x: Slices) -> list[Array]:
        return [shrunk(delta(x, model), cut, x.part) for model, (cut,) in enumerate(cuts)]

    return Vectors(trimmed, (1.0,) * len(density))


def kept_number(density: float, numel: int) -> int:
    """Return how many elements a density keeps: at least one, unless it is 0."""
    return max(1, int(density * numel)) if density > 0 else 0


def magnitudes(models: Sequence[int]) -> Callable[[Slices], list[Array]]:
    """Return what gives the magnitudes of these models' vectors, and None for the others."""

    def values(x: Slices) -> list[Array]:
        import numpy as np

        found: list[Array] = [None] * len(x.models)
        for model in models:
            apart = delta(x, model)
            found[model] = np.abs(apart, out=apart)
        return found

    return values


def shrunk(vector: Array, cut: Cut, part: Part) -> Array:
    """Return a slice, changed in place, with zeros where its magnitude is cut off."""
    import numpy as np

    if cut.value <= 0 and cut.keeps_equals(part):
        return vector
    return masked(vector, cut.keep(np.abs(vector), part))


def masked(vector: Array, mask: Array) -> Array:
    """Set a slice to zero where the mask is false, in place; infinity there becomes NaN."""
    vector *= mask.reshape(vector.shape)
    return vector
