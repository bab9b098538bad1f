"""Brackets around the k-th largest value of streamed vectors: guessed, counted, narrowed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf, sqrt
from typing import Any, NamedTuple

Array = Any  # a numpy array: numpy is imported inside functions
BLOCKS = 128  # of which a sample is made; their spread tells of rows of unlike size
SIGMAS = 3.5  # a guess misses once in some thousand times, which costs one more reading
ROOM = 0.01  # of a whole model's elements, around a guess
PIVOTS = 255
HEAVY = 3  # elements of a sample that are equal: the vector has many of them
THINNED = 1024  # elements of a tensor in a sample of the whole model


@dataclass(frozen=True, slots=True)
class Bracket:
    """Where a value is sought.

    Attributes:
        low, high: the ends; what equals them is counted, never collected.
        content: elements inside, guessed or known.
        pivots: ascending, strictly inside; then elements are counted between them.
    """

    low: float
    high: float
    content: float
    pivots: Array = None


class Found(NamedTuple):
    """What a bracket holds: elements above, on its ends, and inside (or counts by pivots)."""

    above: int
    high: int
    low: int
    inside: Array


@dataclass(frozen=True)
class Sample:
    """Elements of a vector, with what they stand for.

    Attributes:
        taken: in the order of the vector.
        weights: how many elements each stands for; one number for all, or one each.
        room: least distance of the bracket's ends from the rank sought, in elements.
        limit: elements that may be collected.
    """

    taken: Array
    weights: Array
    room: float
    limit: int

    @cached_property
    def _sorted(self) -> tuple[Array, Array]:
        """The values, descending, and how many elements each and those before it stand for."""
        import numpy as np

        if np.ndim(self.weights) == 0:
            steps = np.arange(1, self.taken.size + 1)
            return np.sort(self.taken)[::-1], steps * self.weights
        order = np.argsort(-self.taken)
        return self.taken[order], np.cumsum(self.weights[order])

    def guess(self, rank: int) -> Bracket:
        """Return where the value of that rank from the top (from 1) lies, most probably."""
        import numpy as np

        values, reached = self._sorted
        if not values.size:
            return self.bounded(Bracket(-inf, inf, inf))
        at = min(int(np.searchsorted(reached, rank)), values.size - 1)
        room = max(SIGMAS * self._spread(values[at], rank), self.room)
        high = int(np.searchsorted(reached, rank - room)) - 2
        low = int(np.searchsorted(reached, rank + room)) + 2
        top = values[high] if high >= 0 else _end(values[:HEAVY], inf)
        bottom = values[low] if low < values.size else _end(values[-HEAVY:], -inf)
        held = (values > bottom) & (values < top)
        return self.bounded(Bracket(float(bottom), float(top), float(self._weight(held))))

    def _weight(self, held: Array) -> float:
        import numpy as np

        _, reached = self._sorted
        return float(np.diff(reached, prepend=0.0)[held].sum())

    def _spread(self, value: float, rank: int) -> float:
        """Standard error of a count of elements above the value, in elements."""
        total, size = float(self._sorted[1][-1]), self.taken.size
        share = min(rank / total, 1.0)
        apart = sqrt(share * (1 - share) / size)
        if size % BLOCKS == 0:
            above = (self.taken > value).reshape(BLOCKS, -1).mean(axis=1)
            apart = max(apart, float(above.std()) / sqrt(BLOCKS))
        return apart * total

    def bounded(self, bracket: Bracket) -> Bracket:
        """Return the bracket, with pivots where it would hold too much to collect."""
        import numpy as np

        if bracket.content <= self.limit:
            return bracket
        values, _ = self._sorted
        pivots = np.unique(values[(values > bracket.low) & (values < bracket.high)])
        pivots = pivots[:: max(-(-pivots.size // PIVOTS), 1)]
        if pivots.size < HEAVY:
            pivots = _evenly(bracket.low, bracket.high, values.dtype)
        return Bracket(bracket.low, bracket.high, bracket.content, pivots)


def _end(outermost: Array, beyond: float) -> float:
    """Return the outermost value where many are equal to it, so that they are not collected."""
    heavy = len(outermost) == HEAVY and outermost[0] == outermost[-1]
    return float(outermost[0]) if heavy else beyond


def _evenly(low: float, high: float, dtype: Any) -> Array:  # noqa: ANN401 - numpy's
    """Return numbers between two, evenly among those the dtype has: their bits, in order."""
    import numpy as np

    whole = np.dtype(f"i{dtype.itemsize}")
    least = int(np.iinfo(whole).min)
    first, last = (
        bits if bits >= 0 else least - bits
        for bits in map(int, np.array([low, high], dtype).view(whole))
    )
    cut = {first + (last - first) * n // (PIVOTS + 1) for n in range(1, PIVOTS + 1)}
    inner = sorted(cut - {first, last})
    return np.array([n if n >= 0 else least - n for n in inner], whole).view(dtype)


def single_sample(taken: Array, numel: int, *, limit: int) -> Sample:
    """Return the sample of one tensor's vector; NaN is left out."""
    import numpy as np

    known = taken if not np.isnan(taken).any() else taken[~np.isnan(taken)]
    weight = numel / max(taken.size, 1)
    return Sample(known, np.float64(weight), 2 * weight, limit)


def thinned(taken: Array, numel: int) -> tuple[Array, Array]:
    """Return few of a sample's values, and their weights."""
    import numpy as np

    few = taken.reshape(-1)[:: max(-(-taken.size // THINNED), 1)]
    known = np.array(few[~np.isnan(few)])
    return known, np.full(known.size, numel / max(few.size, 1))


def pooled(parts: Sequence[tuple[Array, Array]], total: int, *, limit: int) -> Sample:
    """Return the sample of a vector through a whole model."""
    import numpy as np

    values, weights = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return Sample(values, weights, ROOM * total, limit)


def count(values: Array, bracket: Bracket) -> Found:
    """Return what a bracket holds of a part; NaN is nowhere."""
    import numpy as np

    over = values >= bracket.low
    reached = int(np.count_nonzero(over))
    over &= values <= bracket.high
    closed = values[over]
    inside = closed[(closed > bracket.low) & (closed < bracket.high)]
    high = int(np.count_nonzero(closed == bracket.high))
    low = closed.size - inside.size - high
    if bracket.pivots is not None:
        slots = np.searchsorted(bracket.pivots, inside, side="right")
        inside = np.bincount(slots, minlength=len(bracket.pivots) + 1)
    return Found(reached - closed.size, high, low, inside)


def joined(parts: Sequence[Found], bracket: Bracket) -> Found:
    """Return what the parts hold together."""
    import numpy as np

    insides = [part.inside for part in parts]
    inside = np.concatenate(insides) if bracket.pivots is None else np.sum(insides, axis=0)
    above, high, low = (sum(part[n] for part in parts) for n in range(3))
    return Found(above, high, low, inside)


def equals(part: Found, bracket: Bracket, value: float) -> int:
    """Return how many of what was counted equal a value that was located."""
    import numpy as np

    if value == bracket.high:
        return part.high
    return part.low if value == bracket.low else int(np.count_nonzero(part.inside == value))


def locate(found: Found, bracket: Bracket, rank: int, total: int) -> Bracket | tuple[float, int]:
    """Return the value of that rank and how many elements equal to it are kept, or a bracket.

    The bracket holds the value for certain. Of `total` elements those that are NaN come last.
    """
    import numpy as np

    if rank <= found.above:
        return Bracket(bracket.high, inf, found.above)
    rank -= found.above
    if rank <= found.high:
        return bracket.high, rank
    rank -= found.high
    held = int(np.sum(found.inside)) if bracket.pivots is not None else len(found.inside)
    if rank <= held:
        return _within(found.inside, bracket, rank)
    rank -= held
    if rank <= found.low or bracket.low == -inf:
        return bracket.low, rank
    return Bracket(-inf, bracket.low, total - found.above - found.high - held - found.low)


def _within(inside: Array, bracket: Bracket, rank: int) -> Bracket | tuple[float, int]:
    import numpy as np

    if bracket.pivots is None:
        place = len(inside) - rank
        value = np.partition(inside, place)[place]
        return float(value), rank - int(np.count_nonzero(inside > value))
    edges = [bracket.low, *bracket.pivots.tolist(), bracket.high]
    reached = np.cumsum(inside[::-1])
    slot = len(inside) - 1 - int(np.searchsorted(reached, rank))
    return Bracket(edges[slot], edges[slot + 1], int(inside[slot]))
