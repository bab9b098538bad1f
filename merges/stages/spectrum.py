"""Singular values by way of small Gram matrices, in float64.

The squares of singular values down to 1e-5 of the largest stand 1e-10 above the rounding of
float64 by six digits; below that they are noise, and count as zero.
"""

from collections.abc import Iterable

from surgery.method import Tensor


def gram(blocks: Iterable[Tensor], size: int) -> Tensor:
    """Return the sum of x^T x over blocks [rows, size]."""
    import torch

    found = torch.zeros(size, size, dtype=torch.float64)
    for block in blocks:
        found.addmm_(block.T, block)
    return found


def spectrum(gram: Tensor, tolerance: float, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Return singular values, the largest first, and right singular vectors as columns.

    Shapes: from the Gram matrix [n, n] of a matrix, [rank] and [n, rank]; rank is at most
    `most`, and counts values above `tolerance` times the largest. What is not finite gives NaN.
    """
    import torch

    size = gram.shape[0]
    if not bool(gram.isfinite().all()):
        return gram.new_full((1,), torch.nan), gram.new_full((size, 1), torch.nan)
    squares, vectors = torch.linalg.eigh(gram)
    floor = float(squares[-1]) * tolerance**2 if size else 0.0
    rank = int((squares > max(floor, 0.0)).sum())
    rank = rank if most is None else min(rank, most)
    return squares[size - rank :].sqrt().flip(0), vectors[:, size - rank :].flip(1)


def inverse_root(gram: Tensor, tolerance: float) -> Tensor:
    """Return the inverse square root of a Gram matrix on its range: x @ it is x's polar factor."""
    values, vectors = spectrum(gram, tolerance)
    return (vectors / values) @ vectors.T


def eigh_bytes(size: int) -> int:
    """Bytes held while a matrix [size, size] is decomposed: it, its vectors, LAPACK's work."""
    return 4 * 8 * size * size
