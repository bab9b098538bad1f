"""Documents in clusters by the tokens they hold: no model, no dtype, no device has a say.

Axis letters: n documents, f features, k clusters, r directions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    Ints = npt.NDArray[np.int64]
    Floats = npt.NDArray[np.float64]

FEATURES = 4096  # single tokens and pairs of neighbours, hashed
_BLOCK = 2048  # documents made dense at once
_POWERS = 4  # passes that sharpen the directions
_STARTS, _ROUNDS = 8, 100
_PRIME = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Features:
    """Weights of features, most of them zero: row i has `weight[first[i]:first[i + 1]]`.

    Attributes:
        first: int64 [n + 1].
        column: int64, of each weight.
        weight: float64; every row has length one.
    """

    first: "Ints"
    column: "Ints"
    weight: "Floats"

    def __len__(self) -> int:
        return len(self.first) - 1

    def blocks(self) -> "Iterator[tuple[slice, Floats]]":
        """Yield the rows, some at a time, as dense arrays."""
        for start in range(0, len(self), _BLOCK):
            end = min(start + _BLOCK, len(self))
            part = slice(self.first[start], self.first[end])
            dense = np.zeros((end - start, FEATURES))
            counts = np.diff(self.first[start : end + 1])
            dense[np.repeat(np.arange(end - start), counts), self.column[part]] = self.weight[part]
            yield slice(start, end), dense


def featurize(documents: "Sequence[npt.NDArray[np.int32]]") -> Features:
    """Return log counts of hashed tokens and pairs, rare ones weighing more (TF-IDF)."""
    counted = [np.unique(_hashed(ids), return_counts=True) for ids in documents]
    first = np.cumsum([0, *(len(columns) for columns, _ in counted)], dtype=np.int64)
    column = np.concatenate([columns for columns, _ in counted]).astype(np.int64)
    counts = np.concatenate([counts for _, counts in counted])
    holders = np.bincount(column, minlength=FEATURES)
    weight = np.log1p(counts) * np.log((1 + len(documents)) / (1 + holders[column]) + 1)
    for a, b in pairwise(first):
        weight[a:b] /= max(float(np.linalg.norm(weight[a:b])), 1e-12)
    return Features(first, column, weight)


def cluster(features: Features, *, clusters: int, seed: int) -> "Ints":
    """Return the cluster of each document, int64 [n], by normalised spectral clustering.

    The affinity of two documents is the cosine of their features, never negative. The eigenvectors
    of its normalised form are then the left singular vectors of the features with each row over
    the root of its degree, which a randomised SVD finds without an affinity of all pairs.

    Source: Ng, Jordan, Weiss, "On spectral clustering", 2001, section 2; randomised SVD after
    arXiv 0909.4061, algorithm 4.4.
    """
    count = min(clusters, len(features))
    if count < 2:  # noqa: PLR2004 - one cluster needs no search
        return np.zeros(len(features), np.int64)
    generator = np.random.Generator(np.random.Philox(seed))
    directions = _directions(features, count, generator)
    lengths = np.linalg.norm(directions, axis=1, keepdims=True)
    return k_means(directions / np.maximum(lengths, 1e-12), count, generator)


def k_means(points: "Floats", count: int, generator: np.random.Generator) -> "Ints":
    """Return the cluster of each point, the best of some starts; points are [n, r].

    Source: Arthur, Vassilvitskii, "k-means++", 2007, section 2.2 (the starts).
    """
    runs = [_lloyd(points, _start(points, count, generator)) for _ in range(_STARTS)]
    return min(runs, key=lambda run: run[0])[1]


def _hashed(ids: "npt.NDArray[np.int32]") -> "npt.NDArray[np.uint64]":
    single = ids.astype(np.uint64) + np.uint64(1)
    pairs = single[:-1] * _PRIME + single[1:]
    mixed = np.concatenate((single, pairs)) * _PRIME
    found: npt.NDArray[np.uint64] = (mixed ^ (mixed >> np.uint64(29))) * _PRIME >> np.uint64(52)
    return found


def _directions(features: Features, count: int, generator: np.random.Generator) -> "Floats":
    total = sum(dense.sum(0) for _, dense in features.blocks())
    scale = np.concatenate([1 / np.sqrt(dense @ total) for _, dense in features.blocks()])
    sketch = generator.standard_normal((FEATURES, min(count + 8, len(features))))
    for _ in range(_POWERS):
        found, _ = np.linalg.qr(_times(features, scale, sketch))
        sketch, _ = np.linalg.qr(_transposed_times(features, scale, found))
    left, _, _ = np.linalg.svd(_times(features, scale, sketch), full_matrices=False)
    kept: Floats = left[:, :count]
    return kept


def _times(features: Features, scale: "Floats", right: "Floats") -> "Floats":
    parts = [(dense @ right) * scale[rows, None] for rows, dense in features.blocks()]
    return np.concatenate(parts)


def _transposed_times(features: Features, scale: "Floats", right: "Floats") -> "Floats":
    total = np.zeros((FEATURES, right.shape[1]))
    for rows, dense in features.blocks():
        total += dense.T @ (right[rows] * scale[rows, None])
    return total


def _start(points: "Floats", count: int, generator: np.random.Generator) -> "Floats":
    chosen = [points[generator.integers(len(points))]]
    nearest = np.full(len(points), np.inf)
    for _ in range(count - 1):
        nearest = np.minimum(nearest, ((points - chosen[-1]) ** 2).sum(1))
        sums = np.cumsum(nearest)
        at = np.searchsorted(sums, generator.random() * sums[-1], side="right")
        chosen.append(points[min(int(at), len(points) - 1)])
    return np.stack(chosen)


def _lloyd(points: "Floats", centres: "Floats") -> "tuple[float, Ints]":
    """Return the cost and the cluster of each point once the centres no longer move."""
    labels = np.zeros(0, np.int64)
    far = np.zeros((0, 0))
    for _ in range(_ROUNDS):
        far = (points**2).sum(1)[:, None] - 2 * points @ centres.T + (centres**2).sum(1)
        found = far.argmin(1)
        if np.array_equal(found, labels):
            break
        labels = found
        sizes = np.bincount(labels, minlength=len(centres))
        sums = np.zeros_like(centres)
        np.add.at(sums, labels, points)
        centres = np.where(sizes[:, None] > 0, sums / np.maximum(sizes, 1)[:, None], centres)
    return float(far.min(1).sum()), labels
