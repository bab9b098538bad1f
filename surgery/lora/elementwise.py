"""Rules on the elements of several adapters' changes, made block by block.

A change is scale * B @ A of one module; its elements exist for a block of rows at a time, in
float32. What is held whole, in float32, is one matrix: first the magnitudes of a change, to find a
threshold, then the merged change, which a decomposition reads several times.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal

from surgery.lora.decompose import block_rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Rule = Callable[[Sequence[Floats]], Floats]

Elementwise = Literal["ties", "dare_linear", "dare_ties", "magnitude_prune"]
WORD = 1 << 32  # of random bits


@dataclass(frozen=True, slots=True)
class Change:
    """One adapter's change of one module: b @ a with the scale in b, both float64."""

    a: Any
    b: Any
    weight: float

    def block(self, at: int, rows: int) -> "Floats":
        """Return some rows of it, [rows, columns]."""
        found: Floats = (self.b[at : at + rows] @ self.a).float().numpy()
        return found


@dataclass(frozen=True, slots=True)
class Cut:
    """Elements to keep: those above a magnitude, and of those equal to it the first ones."""

    magnitude: float
    last: int

    def keep(self, block: "Floats", start: int) -> "Floats":
        """Return a block with everything else zero; `start` is its first flat index."""
        import numpy as np

        size = np.abs(block).reshape(-1)
        ties = np.flatnonzero(size == self.magnitude)
        kept = size > self.magnitude
        kept[ties[ties + start <= self.last]] = True
        return block * kept.reshape(block.shape)


def cut_at(change: Change, shape: tuple[int, int], density: float) -> Cut:
    """Return the cut that keeps int(density * n) elements, the larger first, then the earlier."""
    import numpy as np

    keep = int(density * shape[0] * shape[1])
    if keep == 0:
        return Cut(float("inf"), -1)
    sizes = np.empty(shape, np.float32)
    for at, rows in _rows(shape):
        np.abs(change.block(at, rows), out=sizes[at : at + rows])
    flat = sizes.reshape(-1)
    flat.partition(flat.size - keep)
    magnitude = float(flat[flat.size - keep])
    missing = keep - int(np.count_nonzero(flat > magnitude))
    del sizes, flat
    return Cut(magnitude, _last_tie(change, shape, magnitude, missing))


def _last_tie(change: Change, shape: tuple[int, int], magnitude: float, missing: int) -> int:
    import numpy as np

    for at, rows in _rows(shape):
        ties = np.flatnonzero(np.abs(change.block(at, rows)).reshape(-1) == magnitude)
        if len(ties) >= missing:
            return at * shape[1] + int(ties[missing - 1])
        missing -= len(ties)
    raise AssertionError("fewer ties than counted")


def _rows(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    size = block_rows(shape[1])
    return ((at, min(size, shape[0] - at)) for at in range(0, shape[0], size))


def merged_blocks(
    changes: Sequence[Change],
    shape: tuple[int, int],
    *,
    method: Elementwise,
    density: float,
    seed: str,
) -> Callable[[], Iterator[tuple[int, Any]]]:
    """Return what gives the merged change in blocks of rows, in float64.

    Sources: TIES, arXiv 2306.01708, section 4, the sign elected by the sum of the trimmed changes
    before they are weighted, and the mean over those that agree, as peft has it; DARE, arXiv
    2311.03099, section 3, rescaled by 1 / density.

    Args:
        seed: of the random masks, with the adapter's number and the block's.
    """
    import numpy as np
    import torch

    trims = method in {"ties", "magnitude_prune"}
    cuts = [cut_at(change, shape, density) if trims else None for change in changes]
    weights = [change.weight for change in changes]

    elected = method in {"ties", "dare_ties"}
    merged = np.empty(shape, np.float32)
    for at, rows in _rows(shape):
        found = []
        for number, (change, cut) in enumerate(zip(changes, cuts, strict=True)):
            block = change.block(at, rows)
            if cut is not None:
                found.append(cut.keep(block, at * shape[1]))
            else:
                found.append(_dropped(block, density, f"{seed}\0{number}\0{at}"))
        rule = _elected if elected else _summed
        merged[at : at + rows] = rule(found, weights)

    def blocks() -> Iterator[tuple[int, Any]]:
        for at, rows in _rows(shape):
            yield at, torch.from_numpy(merged[at : at + rows]).double()

    return blocks


def _dropped(block: "Floats", density: float, seed: str) -> "Floats":
    import numpy as np

    words = np.frombuffer(hashlib.sha256(seed.encode()).digest(), np.uint32)
    source = np.random.SFC64(np.random.SeedSequence(words.tolist()))
    raw = source.random_raw((block.size + 1) // 2).view(np.uint32)[: block.size]
    kept = raw < np.uint64(round(density * WORD))
    return block * kept.reshape(block.shape) * np.float32(1 / density)


def _summed(blocks: Sequence["Floats"], weights: Sequence[float]) -> "Floats":
    import numpy as np

    weighted = [b * np.float32(w) for b, w in zip(blocks, weights, strict=True)]
    return reduce(np.add, weighted)


def _elected(blocks: Sequence["Floats"], weights: Sequence[float]) -> "Floats":
    import numpy as np

    positive = reduce(np.add, blocks) >= 0
    agree = [np.where(positive, b > 0, b < 0) for b in blocks]
    kept = [b * mask for b, mask in zip(blocks, agree, strict=True)]
    count = reduce(np.add, [mask.astype(np.float32) for mask in agree])
    return np.divide(_summed(kept, weights), np.maximum(count, 1), dtype=np.float32)
