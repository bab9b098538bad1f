"""Which two units become one: halves laid over each other, or neighbours; heads stay whole."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from growth.dimensions import Axis, Segment
from growth.resized import Mix, along
from surgery.alignment.groups import Heads
from surgery.errors import RecipeError

Pairing = Literal["stacked", "adjacent"]
Pairs = tuple[tuple[int, int], ...]
NAMES: Mapping[str, str] = {
    "hidden": "hidden units",
    "ffn": "feed-forward units",
    "expert ffn": "feed-forward units in each expert",
    "shared ffn": "feed-forward units in the shared expert",
    "query": "attention heads",
}


def pairs_of(count: int, how: Pairing) -> Pairs:
    """Return which two of an even number of things become one: i and i + n/2, or neighbours."""
    half = count // 2
    if how == "stacked":
        return tuple((i, i + half) for i in range(half))
    return tuple((2 * i, 2 * i + 1) for i in range(half))


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """How the units of the larger model are paired.

    Attributes:
        how: which units.
        queries, keys: heads of the larger model.
        keys_paired: key-value heads are paired too; else the queries inside each group.
    """

    how: Pairing
    queries: int
    keys: int
    keys_paired: bool

    def pairs(self, segment: str, units: int) -> Pairs | None:
        """Return the pairs of the larger model's units of a dimension; None where they stay."""
        if segment in {"head", "vocab", "fixed", "experts"}:
            return None
        if segment == "key":
            return pairs_of(units, self.how) if self.keys_paired else None
        return self._queries() if segment == "query" else pairs_of(units, self.how)

    def _queries(self) -> Pairs:
        group = self.queries // self.keys
        if not self.keys_paired:
            inside = pairs_of(group, self.how)
            return tuple(
                (k * group + a, k * group + b) for k in range(self.keys) for a, b in inside
            )
        keys = pairs_of(self.keys, self.how)
        return tuple((a * group + t, b * group + t) for a, b in keys for t in range(group))


def width_of(heads: Heads, how: Pairing) -> Width:
    """Choose the pairs of whole heads: key-value heads with their groups, else within groups.

    Raises:
        RecipeError: neither the key-value heads nor the heads of a group come in pairs.
    """
    keys_paired = heads.keys % 2 == 0
    group = heads.queries // max(heads.keys, 1)
    if heads.queries % max(heads.keys, 1) or not (keys_paired or group % 2 == 0):
        fact = (
            f"has {heads.queries} attention heads over {heads.keys} key-value heads, and whole "
            "heads cannot be paired"
        )
        raise RecipeError("the model", fact, "coalesce its depth alone: --no-width")
    return Width(how=how, queries=heads.queries, keys=heads.keys, keys_paired=keys_paired)


def check_even(axes: Iterable[Axis]) -> None:
    """Refuse a dimension whose units do not come in pairs.

    Raises:
        RecipeError: an odd number of units.
    """
    for segment in (segment for axis in axes for segment in axis.segments):
        if segment.dimension in NAMES and segment.units % 2:
            fact = f"has {segment.units} {NAMES[segment.dimension]}, which cannot be paired"
            raise RecipeError("the model", fact, "coalesce its depth alone: --no-width")


def halved(axis: Axis, width: Width) -> Mix | None:
    """Return the mix of an axis that makes one of two: F, the mean, of outputs, T^T of inputs."""
    factor = 1.0 if axis.side == "in" else 0.5
    return along(axis, {s.dimension: _joined(p, factor) for s, p in _paired(axis, width)})


def doubled(axis: Axis, width: Width) -> Mix | None:
    """Return the mix that makes two of one: copies of outputs, halves of inputs.

    Args:
        axis: of the smaller model.
    """
    factor = 0.5 if axis.side == "in" else 1.0
    large = [Segment(s.dimension, s.units * 2, s.width) for s in axis.segments]
    found = _paired(Axis(tuple(large), axis.side), width)
    return along(axis, {s.dimension: _split(p, factor) for s, p in found})


def _paired(axis: Axis, width: Width) -> list[tuple[Segment, Pairs]]:
    found = ((s, width.pairs(s.dimension, s.units)) for s in axis.segments)
    return [(segment, pairs) for segment, pairs in found if pairs is not None]


def _joined(pairs: Pairs, factor: float) -> Mix:
    import numpy as np

    sources = np.array(pairs, dtype=np.int64)
    return Mix(sources, np.full(sources.shape, factor))


def _split(pairs: Pairs, factor: float) -> Mix:
    import numpy as np

    sources = np.empty((2 * len(pairs), 1), dtype=np.int64)
    for unit, (first, second) in enumerate(pairs):
        sources[[first, second]] = unit
    return Mix(sources, np.full(sources.shape, factor))
