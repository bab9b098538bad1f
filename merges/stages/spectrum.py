"""Singular values by way of small Gram matrices, in float64.

The squares of singular values down to 1e-5 of the largest stand 1e-10 above the rounding of
float64 by six digits; below that they are noise, and count as zero.
"""

import math
from collections.abc import Iterable

from surgery.method import Tensor


def gram(blocks: Iterable[Tensor], size: int) -> Tensor:
    """Return the sum of x^T x over blocks [rows, size]."""
    import torch

    found = torch.zeros(size, size, dtype=torch.float64)
    for block in blocks:
        found.addmm_(block.T, block)
    return found


def spectrum(
    gram: Tensor, tolerance: float, *, most: int | None = None, largest: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return singular values, the largest first, and right singular vectors as columns.

    Shapes: from the Gram matrix [n, n] of a matrix, [rank] and [n, rank]. What is not finite
    gives NaN.

    Args:
        tolerance: values up to this share of the largest count as zero.
        most: of the rank.
        largest: a value to take for the largest if it is larger, squared.
    """
    import torch

    size = gram.shape[0]
    if not math.isfinite(float(gram.sum())):
        return gram.new_full((1,), torch.nan), gram.new_full((size, 1), torch.nan)
    squares, vectors = torch.linalg.eigh(gram)
    top = max(float(squares[-1]) if size else 0.0, largest, 0.0)
    rank = int((squares > top * tolerance**2).sum())
    rank = rank if most is None else min(rank, most)
    return squares[size - rank :].sqrt().flip(0), vectors[:, size - rank :].flip(1)


def inverse_root(gram: Tensor, tolerance: float) -> Tensor:
    """Return the inverse square root of a Gram matrix on its range: x @ it is x's polar factor."""
    values, vectors = spectrum(gram, tolerance)
    return (vectors / values) @ vectors.T


def squares(count: float, size: int) -> int:
    """Return the bytes of some matrices [size, size]."""
    return int(count * 8 * size * size)


DECOMPOSING = 4.2  # squares held meanwhile: the matrix, its vectors, LAPACK's work (measured: 4.1)
