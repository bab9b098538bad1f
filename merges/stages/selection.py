"""The largest elements of streamed vectors, exactly, without sorting or holding any vector.

A sample of 64 Ki elements brackets the k-th largest value; one reading counts what lies above
the bracket and on its ends, and collects what lies strictly inside (about 1%); among those the
value is found exactly. A bracket that missed, or would hold too much, is narrowed and read again.
Ties are decided: the larger value first, then the lower flat index.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import floor, inf
from typing import Any

from merges.stages.bracket import (
    Bracket,
    Found,
    Sample,
    count,
    equals,
    joined,
    locate,
    pooled,
    single_sample,
    thinned,
)
from surgery.passes import Each, Slices
from surgery.plan import Part

Array = Any  # a numpy array
Values = Callable[[Slices], Sequence[Array]]
Targets = Mapping[int, tuple[int, int]]  # number: (vector, rank from the top, from 1)
Counted = tuple[int, dict[int, Found]]  # a part's start, and by target what its bracket holds
Mine = dict[int, list[Found]]  # by target, what its bracket holds of each part of a tensor
# A bracket where the value lies; or the value, how many equal to it are kept, and how many each
# tensor has.
Settled = dict[int, Bracket | tuple[float, int, list[int]]]
Meet = Callable[[Mine, Callable[[list[Mine]], Settled]], Generator[Each, Any, tuple[Settled, int]]]
LIMIT = 4 << 20  # elements collected for a value of one tensor
LIMIT_OF_ALL = 16 << 20  # and of a whole model


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a vector is cut: its k largest elements are kept.

    Attributes:
        value: the k-th largest.
        start, quota: of the elements equal to it, kept are those before the flat index `start`
            and the first `quota` from there on, which all lie in the part that holds `start`.
    """

    value: float
    start: int = 0
    quota: int = 0

    def keep(self, values: Array, part: Part) -> Array:
        """Return the mask of what is kept of a part, in the values' shape.

        NaN is not kept: multiply by the mask, so that NaN stays and the engine names it.
        """
        import numpy as np

        if self.keeps_equals(part):
            return values >= self.value
        kept = values > self.value
        if not self.drops_equals(part):
            equal = np.flatnonzero(values == self.value)
            before = int(np.searchsorted(equal, self.start - part.start))
            kept.reshape(-1)[equal[: before + self.quota]] = True
        return kept

    def keeps_equals(self, part: Part) -> bool:
        """Whether all of a part's elements that equal the value are kept."""
        return self.start >= part.start + part.count

    def drops_equals(self, part: Part) -> bool:
        """Whether none of them is."""
        return self.start < part.start or (self.start == part.start and not self.quota)


ALL = Cut(-inf, 1 << 62)
NONE = Cut(inf)


def largest(
    values: Values, counts: Sequence[Sequence[int]], numel: int
) -> Generator[Each, Any, list[list[Cut]]]:
    """Return where to cut vectors so that their largest elements are kept: `yield from`.

    Args:
        values: gives from slices one numpy array of floats per vector; of at least as many
            vectors as `counts` tells of.
        counts: per vector, for each of its cuts, how many elements are kept; 0 and `numel`
            cost nothing.
        numel: elements of each vector.
    """
    flat = [(vector, kept) for vector, row in enumerate(counts) for kept in row]
    cuts = {n: NONE if k <= 0 else ALL for n, (_, k) in enumerate(flat) if not 0 < k < numel}
    targets = {n: target for n, target in enumerate(flat) if n not in cuts}
    if targets:
        cuts |= yield from _select(values, targets, numel)
    return _folded(cuts, counts)


def order_statistics(
    values: Values, ranks: Sequence[Sequence[int]], numel: int
) -> Generator[Each, Any, list[list[float]]]:
    """Return exact order statistics; rank 0 is the smallest element.

    Shapes: per vector as many numbers as ranks, each rank below `numel`.
    """
    flat = [(vector, numel - rank) for vector, row in enumerate(ranks) for rank in row]
    cuts = yield from _select(values, dict(enumerate(flat)), numel)
    return [[cut.value for cut in row] for row in _folded(cuts, ranks)]


def quantiles(
    values: Values, points: Sequence[Sequence[float]], numel: int
) -> Generator[Each, Any, list[list[float]]]:
    """Return quantiles, interpolated linearly as numpy and torch do.

    Args:
        values: as for `largest`.
        points: per vector, from 0 to 1.
        numel: elements of each vector, at least 1.
    """
    places = [[point * (numel - 1) for point in row] for row in points]
    ranks = [[r for p in row for r in (floor(p), min(floor(p) + 1, numel - 1))] for row in places]
    found = yield from order_statistics(values, ranks, numel)
    return [
        [
            low + (high - low) * (p - floor(p))
            for p, low, high in zip(row, v[::2], v[1::2], strict=True)
        ]
        for row, v in zip(places, found, strict=True)
    ]


def largest_of_all(
    values: Values, shares: Sequence[Sequence[float]], numel: int, *, group: str
) -> Generator[Each, Any, list[list[Cut]]]:
    """Cut vectors that run through all tensors of the merge, in the order of the plan.

    Args:
        values: as for `largest`; the same number of vectors in every tensor.
        shares: per vector, for each of its cuts, the share of this tensor's elements that it
            adds to the number kept in the whole model, rounded down, and at least 1.
        numel: elements of this tensor's vectors.
        group: its name, to be told by the method's `groups`.
    """

    def told(x: Slices) -> Any:  # noqa: ANN401 - one tensor's say
        wanted = [[Fraction(share) * numel for share in row] for row in shares]
        return wanted, numel, [thinned(vector, numel) for vector in values(x)]

    (ranks, total, samples), _ = yield Each(told, sample=True, group=group, combine=_pool)
    flat = [(vector, rank) for vector, row in enumerate(ranks) for rank in row]
    meet = partial(_meet_all, group=group)
    cuts = yield from _search(values, dict(enumerate(flat)), total, samples, meet)
    return _folded(cuts, shares)


def _pool(told: list[list[Any]]) -> tuple[list[list[int]], int, list[Sample]]:
    each = [one for (one,) in told]
    total = sum(numel for _, numel, _ in each)
    wanted = zip(*(wishes for wishes, _, _ in each), strict=True)
    ranks = [
        [min(max(floor(sum(shares)), 1), total) for shares in zip(*rows, strict=True)]
        for rows in wanted
    ]
    samples = zip(*(taken for _, _, taken in each), strict=True)
    return ranks, total, [pooled(vector, total, limit=LIMIT_OF_ALL) for vector in samples]


def _meet_all(
    mine: Mine, settle: Callable[[list[Mine]], Settled], *, group: str
) -> Generator[Each, Any, tuple[Settled, int]]:
    """Settle once what all tensors have found, at the cost of reading a sample."""

    def together(found: list[list[Mine]]) -> Settled:
        return settle([one for (one,) in found])

    met: tuple[Settled, int] = yield Each(
        lambda _: mine, sample=True, group=group, combine=together
    )
    return met


def _meet_nobody(
    mine: Mine, settle: Callable[[list[Mine]], Settled]
) -> Generator[Each, Any, tuple[Settled, int]]:
    yield from ()
    return settle([mine]), 0


def _folded(cuts: Mapping[int, Cut], like: Sequence[Sequence[Any]]) -> list[list[Cut]]:
    order = iter(range(len(cuts)))
    return [[cuts[next(order)] for _ in row] for row in like]


def _select(values: Values, targets: Targets, numel: int) -> Generator[Each, Any, dict[int, Cut]]:
    import numpy as np

    wanted = sorted({vector for vector, _ in targets.values()})

    def take(x: Slices) -> dict[int, Array]:
        every = values(x)
        return {vector: np.array(every[vector]).reshape(-1) for vector in wanted}

    (taken,) = yield Each(take, sample=True)
    if taken[wanted[0]].size == numel:
        return {n: _cut_whole(taken[vector], rank) for n, (vector, rank) in targets.items()}
    samples = {v: single_sample(flat, numel, limit=LIMIT) for v, flat in taken.items()}
    return (yield from _search(values, targets, numel, samples, _meet_nobody))


def _cut_whole(flat: Array, rank: int) -> Cut:
    import numpy as np

    known = flat[~np.isnan(flat)]
    if rank > known.size:
        return ALL
    value = np.partition(known, known.size - rank)[known.size - rank]
    quota = rank - int(np.count_nonzero(known > value))
    return Cut(float(value), int(np.flatnonzero(flat == value)[quota - 1]) + 1)


def _search(
    values: Values,
    targets: Targets,
    total: int,
    samples: Any,  # noqa: ANN401 - by the vector's number
    meet: Meet,
) -> Generator[Each, Any, dict[int, Cut]]:
    asked = {n: samples[vector].guess(rank) for n, (vector, rank) in targets.items()}
    cuts: dict[int, Cut] = {}
    while asked:
        parts: list[Counted] = yield Each(partial(_count, values, targets, asked))
        mine = {n: [found[n] for _, found in parts] for n in asked}
        settled, place = yield from meet(mine, partial(_settle, targets, asked, total))
        missed = {}
        for n, outcome in settled.items():
            if isinstance(outcome, Bracket):
                missed[n] = samples[targets[n][0]].bounded(outcome)
                continue
            value, quota, held = outcome
            own = [(at, equals(found[n], asked[n], value)) for at, found in parts]
            cuts[n] = _cut(value, quota - sum(held[:place]), own)
        asked = missed
    return cuts


def _settle(
    targets: Targets, asked: Mapping[int, Bracket], total: int, everyone: list[Mine]
) -> Settled:
    settled: Settled = {}
    for n, bracket in asked.items():
        together = joined([part for mine in everyone for part in mine[n]], bracket)
        outcome = locate(together, bracket, targets[n][1], total)
        if isinstance(outcome, Bracket):
            settled[n] = outcome
            continue
        value, quota = outcome
        held = [sum(equals(part, bracket, value) for part in mine[n]) for mine in everyone]
        settled[n] = value, quota, held
    return settled


def _count(values: Values, targets: Targets, asked: Mapping[int, Bracket], x: Slices) -> Counted:
    every = values(x)
    found = {n: count(every[targets[n][0]], bracket) for n, bracket in asked.items()}
    return x.part.start, found


def _cut(value: float, quota: int, parts: Sequence[tuple[int, int]]) -> Cut:
    """Place the end of the equal elements kept, told how many each part (start, count) has."""
    if quota <= 0:
        return Cut(value)
    for start, held in parts:
        if quota < held:
            return Cut(value, start, quota)
        quota -= held
    return Cut(value, ALL.start)
