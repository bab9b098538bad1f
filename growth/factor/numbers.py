"""The arithmetic of factored maps: from a matrix to its factors, and back.

Axes: n outputs, m inputs, r rank, K and J blocks of inputs and of outputs.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from growth.factor.form import Form
from growth.recurse.factor import Svd, factorise, gram_matrix

if TYPE_CHECKING:
    from torch import Tensor

    Tensors = tuple[Tensor, ...]

DAMPING = 1e-6  # share of the mean of the Gram matrix's diagonal that is added to it
ITERATIONS = 10  # of the low-rank and the sparse part, in turn


def low_rank(matrix: "Tensor", rank: int, *, svd: Svd, seed: str) -> "tuple[Tensor, Tensor]":
    """Return a [r, m] and b [n, r] with b @ a the nearest of its rank, singular values shared.

    Source: PELA, arXiv 2310.10700, section 3 (truncated SVD). Deviation: roots of the singular
    values go to both sides, so that training moves both alike, as SVD-LLM has them.
    """
    import torch

    found = factorise(matrix, rank, method=svd, seed=seed)
    sizes = found.b.norm(dim=0)
    root = torch.where(sizes > 0, sizes.sqrt(), torch.ones_like(sizes))
    return root[:, None] * found.a, found.b / root


def whitener(gram: "Tensor") -> "Tensor":
    """Return S [m, m], lower, with S S^T the Gram matrix, damped, in float64.

    Source: SVD-LLM, arXiv 2403.07378, section 3.2. Deviation: the Gram matrix is damped by a
    millionth of its mean diagonal, since one of few tokens or dead inputs has no inverse.
    """
    import torch

    held = gram.double()
    held = held.clone() if held is gram else held
    mean = float(held.diagonal().mean())
    held.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    found: Tensor = torch.linalg.cholesky(held)
    return found


def whitened_low_rank(
    weight: "Tensor", gram: "Tensor", rank: int, *, svd: Svd, seed: str
) -> "tuple[Tensor, Tensor]":
    """Return a and b with |(W - b a) X| least, where the Gram matrix is X X^T.

    W S = U D V^T, truncated; b = U D^(1/2), a = D^(1/2) V^T S^-1.

    Source: SVD-LLM, arXiv 2403.07378, section 3.2.
    """
    import torch

    s = whitener(gram)
    a, b = low_rank(weight.double() @ s, rank, svd=svd, seed=seed)
    return torch.linalg.solve_triangular(s, a, upper=False, left=False), b


def monarch(weight: "Tensor", form: Form) -> "tuple[Tensor, Tensor]":
    """Return the blocks a [K, J r, m / K] and b [J, n / J, K r] of the nearest Monarch matrix.

    Each of the K J blocks of W, once its rows are shuffled, is an outer product in the paper, and
    of rank r here; its own truncated SVD is the nearest.

    Source: Monarch, arXiv 2204.00595, section 3.3, algorithm 1. Deviations: any rank; W may be
    rectangular, with block counts of its own for the two sides.
    """
    import torch

    u, sizes, v = torch.linalg.svd(_monarch_blocks(weight, form), full_matrices=False)
    root = sizes[..., : form.rank].sqrt()
    a = root[..., None] * v[..., : form.rank, :]  # [K, J, r, m / K]
    b = u[..., : form.rank] * root[..., None, :]  # [K, J, n / J, r]
    return a.flatten(1, 2), b.permute(1, 2, 0, 3).flatten(2)


def _monarch_blocks(weight: "Tensor", form: Form) -> "Tensor":
    """Return [K, J, n / J, m / K] in float64: from input block k to the outputs o, o mod J = j."""
    first, second = form.blocks
    blocks = weight.double().reshape(-1, second, first, form.inputs // first)
    found: Tensor = blocks.permute(2, 1, 0, 3)
    return found


def sparse_low_rank(
    weight: "Tensor", form: Form, *, dtype: "object", svd: Svd, seed: str
) -> "Tensors":
    """Return a, b, places and values: W ~ b a + S, each part in turn the best for the other.

    The low-rank part is the truncated SVD of what S leaves over; S takes the greatest entries of
    what that leaves over. The error never grows. At last S is taken for the rounded product.

    Args:
        dtype: what the factors are stored as.

    Source: the form is SLTrain's, arXiv 2406.02214, section 3, which draws the places of S at
    random and trains from scratch. Deviation: here a trained W is met, so they are chosen.
    """
    import torch

    flat = torch.zeros_like(weight).view(-1)
    for last in (step == ITERATIONS - 1 for step in range(ITERATIONS)):
        a, b = low_rank(weight - flat.view_as(weight), form.rank, svd=svd, seed=seed)
        a, b = a.to(weight.dtype), b.to(weight.dtype)
        if last:
            a, b = (part.to(dtype).to(weight.dtype) for part in (a, b))  # type: ignore[call-overload]
        left = (weight - b @ a).view(-1)
        places = left.abs().topk(form.entries, sorted=False).indices.sort().values
        values = left[places]
        flat.zero_()[places] = values
    return a, b, places, values


def dense(form: Form, parts: "Sequence[Tensor]") -> "Tensor":
    """Return the matrix [n, m] that factors stand for, in their own precision."""
    import torch

    a, b = parts[:2]
    if form.kind == "monarch":
        first, second = form.blocks
        a = a.view(first, second, form.rank, -1)
        b = b.view(second, -1, first, form.rank)
        return torch.einsum("jlkr,kjri->ljki", b, a).reshape(form.shape)
    product = b @ a
    if form.kind == "sparse-low-rank":
        product.view(-1).index_add_(0, parts[2].long(), parts[3])
    return product


def spectrum(form: Form, weight: "Tensor", gram: "Tensor | None") -> "Tensor":
    """Return what each rank adds to the squared length, falling, in float64, [most]."""
    import torch

    if form.kind == "monarch":
        sizes = torch.linalg.svdvals(_monarch_blocks(weight, form))
        found: Tensor = sizes.square().sum(dim=(0, 1))
        return found
    matrix = weight if gram is None else weight.double() @ whitener(gram)
    squares: Tensor = torch.linalg.eigvalsh(gram_matrix(matrix)).flip(0)
    return squares.clamp_min(0)


def lost(weight: "Tensor", change: "Tensor", gram: "Tensor | None") -> dict[str, float]:
    """Return squared lengths of a change and of the weight, and the same of their outputs."""
    found = {"_lost": _squared(change), "_whole": _squared(weight)}
    if gram is not None:
        found["_lost_output"] = float(((change @ gram) * change).double().sum())
        found["_whole_output"] = float(((weight @ gram) * weight).double().sum())
    return found


def _squared(matrix: "Tensor") -> float:
    return float(matrix.double().square().sum())
