"""Singular values and vectors of a matrix that is read in blocks of rows, in float64.

Axes: n rows, m columns, k kept, l = k + OVERSAMPLING.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Method = Literal["randomized", "exact"]
Blocks = Callable[[], Iterator["tuple[int, Tensor]"]]  # (first row, rows of it)
OVERSAMPLING = 10
POWERS = 2  # each takes two readings; a flat spectrum needs them
BLOCK = 1 << 18  # elements of a block of rows


@dataclass(frozen=True, slots=True)
class Decomposition:
    """The leading part of u @ diag(s) @ v, and the squared length of the whole.

    Attributes:
        u: [n, k].
        s: [k], falling.
        v: [k, m].
        whole: the sum of all squared singular values.
    """

    u: Any
    s: Any
    v: Any
    whole: float

    @property
    def share(self) -> float:
        """The share of the squared length that is kept; 1 where there is nothing to keep."""
        kept = float(self.s.square().sum())
        return min(kept / self.whole, 1.0) if self.whole else 1.0

    def factors(self) -> "tuple[Tensor, Tensor]":
        """Return a [k, m] and b [n, k], the singular values shared between them, b @ a = u s v."""
        root = self.s.sqrt()
        return root[:, None] * self.v, self.u * root


def is_exact(shape: tuple[int, int], rank: int, method: Method) -> bool:
    """Whether the whole matrix is decomposed: as asked, or where a sketch would be as large."""
    return method == "exact" or rank + OVERSAMPLING >= min(shape)


def scratch(shape: tuple[int, int], rank: int, method: Method) -> int:
    """Return the bytes that `decompose` holds."""
    n, m = shape
    if is_exact(shape, rank, method):
        return 8 * (3 * n * m + 2 * min(n, m) ** 2)
    return 8 * (3 * (n + m) * (rank + OVERSAMPLING) + 4 * max(BLOCK, m))


def decompose(
    blocks: Blocks, shape: tuple[int, int], *, rank: int, method: Method, seed: str
) -> Decomposition:
    """Return the `rank` leading singular triplets.

    Source of `randomized`: Halko, Martinsson and Tropp, "Finding structure with randomness",
    arXiv 0909.4061, algorithms 4.4 and 5.1, with a QR after every product.

    Args:
        blocks: called for every reading.
        seed: of the sketch.
    """
    if is_exact(shape, rank, method):
        return _exact(blocks, shape, rank)
    return _randomized(blocks, shape, rank, seed)


def _exact(blocks: Blocks, shape: tuple[int, int], rank: int) -> Decomposition:
    import torch

    held = torch.empty(shape, dtype=torch.float64)
    for start, block in blocks():
        held[start : start + len(block)] = block
    whole = float(held.square().sum())
    u, s, v = torch.linalg.svd(held, full_matrices=False)
    return Decomposition(u[:, :rank], s[:rank], v[:rank], whole)


def _randomized(blocks: Blocks, shape: tuple[int, int], rank: int, seed: str) -> Decomposition:
    import torch

    n, m = shape
    squares: list[float] = []
    basis = _gaussian((m, rank + OVERSAMPLING), seed)
    q = _orthonormal(_times(blocks, n, basis, squares))
    for _ in range(POWERS):
        basis = _orthonormal(_transposed_times(blocks, q, m))
        q = _orthonormal(_times(blocks, n, basis))
    small = _transposed_times(blocks, q, m).T
    u, s, v = torch.linalg.svd(small, full_matrices=False)
    return Decomposition(q @ u[:, :rank], s[:rank], v[:rank], sum(squares))


def _gaussian(shape: tuple[int, int], seed: str) -> "Tensor":
    import numpy as np
    import torch

    words = np.frombuffer(hashlib.sha256(seed.encode()).digest(), np.uint32)
    source = np.random.Generator(np.random.SFC64(np.random.SeedSequence(words.tolist())))
    return torch.from_numpy(source.standard_normal(shape))


def _orthonormal(matrix: "Tensor") -> "Tensor":
    import torch

    q: Tensor = torch.linalg.qr(matrix)[0]
    return q


def _times(blocks: Blocks, n: int, right: "Tensor", squares: list[float] | None = None) -> "Tensor":
    found = right.new_empty((n, right.shape[1]))
    for start, block in blocks():
        found[start : start + len(block)] = block @ right
        if squares is not None:
            squares.append(float(block.square().sum()))
    return found


def _transposed_times(blocks: Blocks, left: "Tensor", m: int) -> "Tensor":
    found = left.new_zeros((m, left.shape[1]))
    for start, block in blocks():
        found += block.T @ left[start : start + len(block)]
    return found


def block_rows(columns: int) -> int:
    """Return how many rows a block has."""
    return max(BLOCK // max(columns, 1), 1)
