"""The leading factors of a matrix that is held, on any device.

Axes: n rows, m columns, r kept, l = r + OVERSAMPLING.
"""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Svd = Literal["randomized", "gram", "exact"]
METHODS: tuple[Svd, ...] = ("randomized", "gram", "exact")
OVERSAMPLING = 10
POWERS = 2
BAND = 256  # rows or columns that are widened to float64 at once
DOUBLE = 8  # bytes


@dataclass(frozen=True, slots=True)
class Factors:
    """b @ a, the nearest of its rank.

    Attributes:
        b: [n, r], the left singular vectors times the singular values.
        a: [r, m], the right singular vectors; where the matrix is zero, random.
        kept, whole: squared lengths of b @ a and of the matrix.
    """

    b: Any
    a: Any
    kept: float
    whole: float


def chosen(shape: tuple[int, int], rank: int, method: Svd) -> Svd:
    """Return how a matrix is decomposed: as asked, but a sketch as large as it is saves nothing."""
    if method == "randomized" and rank + OVERSAMPLING >= min(shape):
        return "gram"
    return method


def scratch(shape: tuple[int, int], rank: int, method: Svd, width: int) -> int:
    """Return the bytes that `factorise` holds beside the matrix, whose numbers have `width`."""
    n, m = shape
    few = min(shape)
    match chosen(shape, rank, method):
        case "exact":
            return DOUBLE * (2 * n * m + 4 * few * few)
        case "gram":
            return DOUBLE * (4 * few * few + 2 * BAND * max(shape) + 2 * (n + m) * rank)
        case _:
            return (3 * width + 3 * DOUBLE) * (n + m) * (rank + OVERSAMPLING)


def factorise(matrix: "Tensor", rank: int, *, method: Svd, seed: str) -> Factors:
    """Return b = U_r S_r and a = V_r^T of the `rank` leading singular triplets.

    Shapes: matrix [n, m]; a zero matrix gets b = 0 and a from N(0, 1 / rank^2).

    `randomized` multiplies in the matrix's own precision and makes bases orthonormal in float64;
    `gram` takes the eigenvectors of the smaller of R R^T and R^T R in float64; `exact` is the
    full decomposition in float64.

    Source: arXiv 2410.20672, section 2.3 (B = U_r S_r, A = V_r^T) and figure C.1 (the zero
    matrix); arXiv 0909.4061, algorithms 4.4 and 5.1. Deviation: the standard deviation of the
    random A is not told there; it is that of peft.
    """
    whole = squared(matrix)
    if not whole:
        return _silent(matrix, rank, seed)
    match chosen((matrix.shape[0], matrix.shape[1]), rank, method):
        case "exact":
            b, a = _exact(matrix, rank)
        case "gram":
            b, a = _gram(matrix, rank)
        case _:
            b, a = _randomized(matrix, rank, seed)
    kept = float(b.double().square().sum())
    return Factors(b, a, min(kept, whole), whole)


def squared(matrix: "Tensor") -> float:
    """Return the sum of the squares, added up in float64."""
    total = 0.0
    for rows in range(0, matrix.shape[0], BAND):
        total += float(matrix[rows : rows + BAND].double().square().sum())
    return total


def gram_matrix(matrix: "Tensor") -> "Tensor":
    """Return R R^T or R^T R, whichever is smaller, in float64."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    found: Tensor | None = None
    for at in range(0, wide.shape[1], BAND):
        band = wide[:, at : at + BAND].double()
        product = band @ band.T
        found = product if found is None else found.add_(product)
    assert found is not None  # noqa: S101 - a matrix has columns
    return found


def gaussian(shape: tuple[int, int], seed: str) -> "Tensor":
    """Return standard normal numbers that depend on the seed alone."""
    import numpy as np
    import torch

    words = np.frombuffer(hashlib.sha256(seed.encode()).digest(), np.uint32)
    source = np.random.Generator(np.random.SFC64(np.random.SeedSequence(words.tolist())))
    return torch.from_numpy(source.standard_normal(shape))


def _silent(matrix: "Tensor", rank: int, seed: str) -> Factors:
    n, m = matrix.shape
    a = gaussian((rank, m), seed).to(matrix.device, matrix.dtype) / rank
    return Factors(matrix.new_zeros((n, rank)), a, 0.0, 0.0)


def _exact(matrix: "Tensor", rank: int) -> "tuple[Tensor, Tensor]":
    import torch

    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u[:, :rank] * s[:rank], v[:rank]


def _gram(matrix: "Tensor", rank: int) -> "tuple[Tensor, Tensor]":
    import torch

    leading = torch.linalg.eigh(gram_matrix(matrix))[1][:, -rank:].flip(1)
    if matrix.shape[0] <= matrix.shape[1]:
        return _split(leading, _rows_times(leading.T, matrix))
    return _rows_times(leading.T, matrix.T).T, leading.T


def _rows_times(left: "Tensor", matrix: "Tensor") -> "Tensor":
    """Return left @ matrix in float64."""
    import torch

    starts = range(0, matrix.shape[1], BAND)
    return torch.cat([left @ matrix[:, at : at + BAND].double() for at in starts], dim=1)


def _split(basis: "Tensor", rows: "Tensor") -> "tuple[Tensor, Tensor]":
    """Return basis @ rows as factors of which the second has rows of length 1, or 0."""
    lengths = rows.norm(dim=1)
    safe = lengths.clamp_min(lengths.new_tensor(1e-300))
    return basis * lengths, rows / safe[:, None]


def _randomized(matrix: "Tensor", rank: int, seed: str) -> "tuple[Tensor, Tensor]":
    import torch

    sketch = gaussian((matrix.shape[1], rank + OVERSAMPLING), seed)
    q = _orthonormal(matrix @ sketch.to(matrix.device, matrix.dtype))
    for _ in range(POWERS):
        q = _orthonormal(matrix.T @ q)
        q = _orthonormal(matrix @ q)
    small = (matrix.T @ q).T.double()  # [l, m]
    leading = torch.linalg.eigh(small @ small.T)[1][:, -rank:].flip(1)  # [l, r]
    return _split(q.double() @ leading, leading.T @ small)


def _orthonormal(matrix: "Tensor") -> "Tensor":
    import torch

    q: Tensor = torch.linalg.qr(matrix.double())[0]
    return q.to(matrix.dtype)
