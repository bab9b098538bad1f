"""The largest singular values of a matrix by a randomised sketch, where few of many are wanted."""

import math
from collections.abc import Callable, Iterator

from surgery.lora.decompose import decompose, scratch
from surgery.method import Place, Tensor


def leading(
    blocks: Callable[[], Iterator[Tensor]],
    shape: tuple[int, int],
    rank: int,
    *,
    tolerance: float,
    place: Place,
    part: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return the first singular values and right singular vectors of x, as `spectrum` does.

    Exact where x has no more than `rank` singular values; else the less so the more slowly
    they fall. The sketch is drawn by the recipe's seed, the tensor's name and `part`.

    Args:
        blocks: reads x once, in blocks of rows.
        shape: of x.
        rank: at most this many.
    """
    import torch

    seed, most = f"{place.seed}\0{place.name}\0sketch\0{part}", min(rank, *shape)

    def read() -> Iterator[tuple[int, Tensor]]:
        return _placed(blocks())

    try:
        found = decompose(read, shape, rank=most, method="randomized", seed=seed)
    except _NotFiniteError:
        return torch.full((1,), torch.nan).double(), torch.full((shape[1], 1), torch.nan).double()
    floor = float(found.s[0]) * tolerance if len(found.s) else 0.0
    kept = int((found.s > floor).sum())
    return found.s[:kept], found.v[:kept].T


class _NotFiniteError(Exception):
    """Stops a decomposition that would stop with another error."""


def _placed(blocks: Iterator[Tensor]) -> Iterator[tuple[int, Tensor]]:
    start = 0
    for block in blocks:
        if not math.isfinite(float(block.sum())):
            raise _NotFiniteError
        yield start, block
        start += len(block)


def leading_bytes(shape: tuple[int, int], rank: int) -> int:
    """Return the bytes that `leading` holds."""
    return scratch(shape, min(rank, *shape), "randomized")
