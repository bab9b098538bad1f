"""Trim at random by rank: the larger a magnitude is in its row, the likelier it is kept (MagPrune).

An element is kept with the probability density - epsilon + 2 epsilon rank / (columns - 1); only
those whose random number falls between the ends need their rank, and of it only whether it is
high enough: one sort of each row's magnitudes tells, without their places.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any

from merges.stages.masks import by_masks
from merges.stages.trim import Vectors
from merges.stages.weights import check_shares
from surgery.errors import RecipeError
from surgery.method import Param, PerModel
from surgery.passes import Slices

Epsilon = Annotated[
    PerModel[float], Param("how far the probability goes below and above the density", ge=0)
]
Array = Any  # a numpy array
UNIT = 2**31  # of the 32 random bits, one decides between equal magnitudes


def check_ranks(values: Mapping[str, Any]) -> None:
    """Check at plan time that the probabilities are some.

    Raises:
        RecipeError: density - epsilon or density + epsilon is not between 0 and 1.
    """
    for share, room in zip(values["density"], values["epsilon"], strict=True):
        if share < 1 and not 0 < share - room <= share + room < 1:
            fact = f"{room:g} does not fit density {share:g}: density +- epsilon must lie in (0, 1)"
            raise RecipeError("epsilon", fact, "take a smaller epsilon, or density 1 to keep all")


def check_ranks_and_shares(values: Mapping[str, Any]) -> None:
    """Check the probabilities, and weights that are to be divided by their sum."""
    check_ranks(values)
    check_shares(values)


def by_rank(density: Sequence[float], epsilon: Sequence[float], *, inverse: bool) -> Vectors:
    """Keep elements at random, by the rank of their magnitude in its row.

    Equal magnitudes have the same probability, that of the mean of their ranks.

    Args:
        density: the mean probability, per model; 1 keeps all.
        epsilon: how far the probability goes below and above, per model.
        inverse: divide what is kept by its probability.

    Source: DELLA-Merging, arXiv 2406.11617, section 3.1 (MagPrune).
    """
    import numpy as np

    def draw(x: Slices, model: int, vector: Array) -> Array:
        values = np.abs(vector)
        share, room = density[model], epsilon[model]
        mask = kept(values, x.bits(model), share, room)
        return mask / probabilities(values, share, room) if inverse else mask

    return by_masks(draw, [n for n, share in enumerate(density) if share < 1], len(density))


def kept(values: Array, bits: Array, density: float, epsilon: float) -> Array:
    """Draw which elements are kept.

    Of equal magnitudes each is drawn with the lowest or the highest of their ranks, by its
    lowest bit: with the mean rank's probability.

    Shapes: magnitudes [rows, columns] and bits [rows * columns] to a mask [rows, columns].
    """
    import numpy as np

    columns = values.shape[-1]
    drawn = bits >> 1
    if columns == 1 or epsilon == 0:
        return (drawn < np.uint32(np.ceil(density * UNIT))).reshape(values.shape)
    low, high = density - epsilon, density + epsilon
    mask = drawn < np.uint32(np.ceil(low * UNIT))
    open_ = np.flatnonzero((drawn < np.uint32(np.ceil(high * UNIT))) ^ mask)
    chosen = bits.take(open_)
    needed = ((chosen >> 1) * (1 / UNIT) - low) * ((columns - 1) / (high - low))
    coin = (chosen & 1).view(np.int32)
    place = np.minimum(needed.astype(np.int32), columns - 2)
    place += coin
    place += _row_starts(*values.shape).take(open_)
    # Bits of floats that are not negative are in the floats' order.
    whole = values.view(f"i{values.itemsize}")
    reached = np.sort(values, axis=-1).view(whole.dtype).take(place)
    mask[open_] = whole.take(open_) + coin > reached
    return mask.reshape(values.shape)


@lru_cache(maxsize=8)
def _row_starts(rows: int, columns: int) -> Array:
    """Return for every element where its row starts: few sizes of parts ask, often."""
    import numpy as np

    return np.repeat(np.arange(rows, dtype=np.int32) * columns, columns)


def probabilities(values: Array, density: float, epsilon: float) -> Array:
    """Return the probability of every element to be kept, [rows, columns] as its magnitude."""
    import numpy as np

    columns = values.shape[-1]
    if columns == 1:
        return np.full(values.shape, density)
    order = np.argsort(values, axis=-1)
    ordered = np.take_along_axis(values, order, axis=-1)
    place = np.broadcast_to(np.arange(columns), values.shape)
    new = np.ones(values.shape, bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    last = np.ones(values.shape, bool)
    last[:, :-1] = new[:, 1:]
    first = np.maximum.accumulate(np.where(new, place, 0), axis=-1)
    end = np.minimum.accumulate(np.where(last, place, columns)[:, ::-1], axis=-1)[:, ::-1]
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (first + end) / 2, axis=-1)
    return density - epsilon + 2 * epsilon * ranks / (columns - 1)
