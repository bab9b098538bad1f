"""Paired statistics over documents."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# A bootstrap of fewer documents is too narrow to be believed: with 7 equal chances all fall on
# one side, and the interval misses zero, more than once in a hundred times by luck alone.
FEWEST_DOCUMENTS = 8

_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Bits per byte of a child minus those of its parent.

    Attributes:
        bits_per_byte: The difference; below zero the child is better.
        low: Lower end of the 95% interval, or None where documents are too few for one.
        high: Upper end, likewise.
        verdict: "better", "worse", "not distinguishable", "equal" (every document, to the
            last bit), or "too few documents".
    """

    bits_per_byte: float
    low: float | None
    high: float | None
    verdict: str


def bits_per_byte(nats: float, size: float) -> float:
    """Return nats over a text of `size` bytes as bits per byte."""
    return nats / (math.log(2) * size)


def paired_difference(
    child: Floats, parent: Floats, *, draws: int = 2000, seed: int = 0
) -> Difference:
    """Compare two models over the same documents by a paired percentile bootstrap.

    Shapes: child and parent are [documents, 2], columns nats and bytes. A draw takes documents
    with replacement, the same ones for both models, and each model's figure is a ratio of sums.
    Documents of which a model scores no byte take no part in the interval.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13.
    """
    point = float(_ratio(child.sum(0)) - _ratio(parent.sum(0)))
    both = np.concatenate([child, parent], axis=1)
    both = both[(both[:, 1] > 0) & (both[:, 3] > 0)]
    if len(both) < FEWEST_DOCUMENTS:
        return Difference(bits_per_byte=point, low=None, high=None, verdict="too few documents")
    sums = np.concatenate(resampled_sums(both, draws=draws, seed=seed))
    differences = _ratio(sums[:, :2]) - _ratio(sums[:, 2:])
    low, high = (float(x) for x in np.quantile(differences, [0.025, 0.975]))
    return Difference(bits_per_byte=point, low=low, high=high, verdict=_verdict(low, high))


def quantiles(values: npt.NDArray[np.float32], at: Sequence[float]) -> list[float]:
    """Return quantiles of values in float64, interpolated linearly."""
    return [float(x) for x in np.quantile(values.astype(np.float64), at)]


def _ratio(sums: Floats) -> Floats:
    ratio: Floats = sums[..., 0] / (math.log(2) * sums[..., 1])
    return ratio


def resampled_sums(values: Floats, *, draws: int, seed: int) -> list[Floats]:
    """Return column sums over documents drawn with replacement.

    Shapes: values is [documents, columns]; the parts together are [draws, columns].
    """
    rng = np.random.default_rng(seed)
    count = len(values)
    at_once = max(1, _BLOCK // count)
    return [
        values[rng.integers(0, count, size=(min(at_once, draws - done), count))].sum(axis=1)
        for done in range(0, draws, at_once)
    ]


def _verdict(low: float, high: float) -> str:
    if low == high == 0:
        return "equal"
    if low <= 0 <= high:
        return "not distinguishable"
    return "better" if high < 0 else "worse"
