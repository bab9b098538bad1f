"""Which old unit each new one is a copy of."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

from growth.dimensions import Axis, Dimension
from growth.resized import Mix, along, selection

if TYPE_CHECKING:
    import numpy as np

    Integers = np.ndarray[Any, np.dtype[np.int64]]

Method = Literal["tile", "fpi", "aki"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Widening:
    """How every dimension grows.

    Attributes:
        ratios: new size over old, per dimension that grows.
        method: `tile` repeats all units in order, the others choose which ones.
        group: query heads to a key-value head.
        noise: standard deviation of what sets copies apart, of their size; 0 for none.
        seed: of choices and noise.
    """

    ratios: Mapping[Dimension, Fraction]
    method: Method
    group: int
    noise: float
    seed: int

    def size(self, dimension: Dimension, units: int) -> int:
        """Return the new number of units."""
        return int(units * self.ratios.get(dimension, Fraction(1)))

    def sources(self, dimension: Dimension, units: int, layer: int | None) -> "Integers":
        """Return the old unit that each new one copies: [new units].

        Query heads follow their key-value head. The residual stream has one choice for all layers.
        """
        import numpy as np

        new = self.size(dimension, units)
        if self.method == "tile":
            return np.arange(new, dtype=np.int64) % units
        if dimension == "query":
            heads = self.sources("key", units // self.group, layer)
            return (heads[:, None] * self.group + np.arange(self.group)).ravel()
        place = "" if dimension == "hidden" else f"{layer}"
        return balanced(units, new, f"{self.seed}\0{dimension}\0{place}")

    def mix(self, axis: Axis, layer: int | None) -> Mix | None:
        """Return the mix of an axis; along inputs every copy gets an equal share of its source."""
        units: dict[str, Mix] = {}
        for segment in axis.segments:
            if segment.dimension in self.ratios:
                sources = self.sources(segment.dimension, segment.units, layer)
                mix = selection(sources)
                units[segment.dimension] = mix if axis.side == "out" else shared(mix)
        return along(axis, units)


def shared(mix: Mix) -> Mix:
    """Return the selection with each new index divided by how often its source is copied."""
    return mix.scaled(1.0 / copies(mix.sources[:, 0]))


def copies(sources: "Integers") -> Any:  # noqa: ANN401 - an array of integers
    """Return how often the source of each new unit is copied: [new units]."""
    import numpy as np

    return np.bincount(sources)[sources]


def balanced(units: int, new: int, seed: str) -> "Integers":
    """Return all units in order and then `new - units` random ones, spread evenly over all."""
    import numpy as np

    stream = np.random.Philox(key=key_of(seed))
    rounds = -(-(new - units) // units)
    drawn = [np.argsort(stream.random_raw(units), kind="stable") for _ in range(rounds)]
    return np.concatenate([np.arange(units, dtype=np.int64), *drawn])[:new]


def key_of(seed: str) -> int:
    """Return the 128 bits that seed a stream of random numbers."""
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:16], "little")
