"""Where the scales of a weight lie: one per block, group, row, column, expert or tensor."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from surgery.checkpoint import TensorInfo
from surgery.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    Floats = Callable[[TensorInfo, int, int], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Numbers spread over a weight of [leading axes, rows, columns].

    Attributes:
        stored: the numbers as a matrix, [leads * down, across].
        rows: of one matrix of the weight.
        down: blocks of one matrix from top to bottom.
        height, width: rows and columns of a block.
        leads: whether each matrix of the weight has numbers of its own.
    """

    stored: TensorInfo
    rows: int
    down: int
    height: int
    width: int
    leads: bool

    def place(self, row: int) -> int:
        """Return the row of `stored` that a row of the weight belongs to."""
        lead, inside = divmod(row, self.rows)
        return (lead * self.down if self.leads else 0) + inside // self.height

    def of_rows(self, floats: "Floats", start: int, count: int) -> "torch.Tensor":
        """Return the numbers of rows of the weight, [count or 1, across]."""
        import torch

        places = [self.place(row) for row in range(start, start + count)]
        low, high = min(places), max(places)
        found = floats(self.stored, low, high - low + 1)
        if low == high:
            return found
        return found.index_select(0, torch.tensor(places) - low)


def lay(
    stored: TensorInfo, shape: tuple[int, ...], block: tuple[int | None, int | None] = (None, None)
) -> Grid:
    """Find how numbers of a stored shape cover a weight of `shape`.

    Args:
        block: rows and columns of a block, as the config says; the last one may be cut off.

    Raises:
        CheckpointError: they do not cover it evenly.
    """
    matrices, (rows, columns) = math.prod(shape[:-2]), shape[-2:]
    leads, down, across = _counts(stored, matrices, rows)
    height, width = _size(rows, down, block[0]), _size(columns, across, block[1])
    if leads not in {1, matrices} or not height or not width:
        fact = f"{stored.name!r} of shape {list(stored.shape)} does not cover {list(shape)}"
        raise CheckpointError(stored.file, fact, "the checkpoint is damaged, or of another format")
    matrix = replace(stored, shape=(leads * down, across))
    return Grid(stored=matrix, rows=rows, down=down, height=height, width=width, leads=leads > 1)


def _counts(stored: TensorInfo, matrices: int, rows: int) -> tuple[int, int, int]:
    """Return how many numbers there are per leading axis, row and column."""
    shape = stored.shape
    if stored.numel == 1:
        return 1, 1, 1
    if len(shape) == 1:
        return (matrices, 1, 1) if shape[0] == matrices != rows else (1, shape[0], 1)
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def _size(length: int, count: int, told: int | None) -> int:
    """Return the length of a block where `count` cover `length`; 0 where they cannot."""
    if count <= 1:
        return length if count else 0
    if told and -(-length // told) == count:
        return told
    return 0 if length % count else length // count


def spread(
    values: "torch.Tensor",
    grid: Grid,
    numbers: "torch.Tensor",
    op: str,
    order: "torch.Tensor | None",
) -> None:
    """Apply numbers to rows of a weight in place.

    Args:
        values: [rows, columns].
        numbers: what `of_rows` gave, [rows or 1, across].
        op: the name of torch's in-place operation.
        order: per column the block that it belongs to, where they are not in sequence.
    """
    apply = getattr(values, op)
    if order is not None:
        apply(numbers.index_select(1, order))
        return
    if numbers.shape[1] == 1 or grid.width == 1:
        apply(numbers)
        return
    whole = values.shape[1] // grid.width
    body = values[:, : whole * grid.width].view(len(values), whole, grid.width)
    getattr(body, op)(numbers[:, :whole, None])
    if whole < numbers.shape[1]:
        getattr(values[:, whole * grid.width :], op)(numbers[:, whole:])
