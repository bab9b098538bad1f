"""The largest singular values of a matrix by a randomised sketch, where few of many are wanted."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

from merges.stages.spectrum import gram, spectrum
from surgery.method import Place, Tensor

OVERSAMPLING = 16  # directions beyond those wanted
ITERATIONS = 4  # rounds of multiplying by x^T x


def leading(
    blocks: Callable[[], Iterator[Tensor]],
    size: int,
    rank: int,
    *,
    tolerance: float,
    place: Place,
    part: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return the first singular values and right singular vectors of x [rows, size].

    Exact where x has no more than `rank` + 16 singular values; else the less so the more slowly
    they fall. The start is drawn by the recipe's seed, the tensor's name and `part`.

    Shapes: as `spectrum` gives, of at most `rank`.

    Args:
        blocks: reads x once, in blocks of rows.

    Source: Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 2011,
    algorithm 4.4, on x^T x.
    """
    import torch

    wide = min(rank + OVERSAMPLING, size)
    basis = torch.randn(size, wide, generator=_generator(place, part), dtype=torch.float64)
    for _ in range(ITERATIONS):
        basis, _triangle = torch.linalg.qr(basis)
        found = torch.zeros(size, wide, dtype=torch.float64)
        for block in blocks():
            found.addmm_(block.T, block @ basis)
        if not torch.isfinite(found.sum()):
            return found.new_full((1,), torch.nan), found.new_full((size, 1), torch.nan)
        basis = found
    basis, _triangle = torch.linalg.qr(basis)
    values, right = spectrum(gram((b @ basis for b in blocks()), wide), tolerance, most=rank)
    return values, basis @ right


def _generator(place: Place, part: int) -> Any:  # noqa: ANN401 - torch's
    import torch

    text = f"{place.seed}\0{place.name}\0sketch\0{part}"
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
    return torch.Generator().manual_seed(number)
