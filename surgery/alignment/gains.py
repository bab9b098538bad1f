"""Inner products of one model's units with another's, and the best matching of a group."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.alignment.slots import Group, Slot, Spread
from surgery.assignment import assign
from surgery.checkpoint import TensorInfo, rows_of
from surgery.checkpoint.view import ReadRows

if TYPE_CHECKING:
    import numpy as np
    import torch

    Order = np.ndarray[Any, np.dtype[np.int64]]
    Matrix = np.ndarray[Any, np.dtype[np.floating[Any]]]
    Pairs = Iterator[tuple[torch.Tensor, torch.Tensor]]

DEEP = 512  # terms of an inner product that are summed in float32, before float64 takes over
BLOCK = 4 << 20  # elements that are held as floats at once
FINE = 4096  # units up to which gains are summed in float64

Tick = Callable[[int], None]  # takes bytes read


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """How the units of a group are matched.

    Attributes:
        fine: per place the unit of the model that goes there.
        coarse: the same of coarse units.
        before, after: cosine of the two models' tensors as they lie, and matched.
        gain: what the matching adds to the sum of inner products.
        weights: what the inner products of each fine slot counted.
    """

    fine: "Order"
    coarse: "Order"
    before: float
    after: float
    gain: float
    weights: tuple[float, ...]


def gains_bytes(group: Group) -> int:
    """Return the memory that matching a group takes: the gains, a slot, blocks of floats."""
    held = max((slot.held for slot in group.fine), default=0)
    square = group.units**2 * (8 if group.units <= FINE else 4)
    return 2 * square + held + 3 * 4 * BLOCK


def match(group: Group, read: ReadRows, tick: Tick) -> Matched:
    """Find the matching of a group with the largest sum of inner products.

    It is exact for the whole group: for each pair of coarse units the best matching of the fine
    ones inside, and on these sums the best matching of the coarse ones. Where nothing is gained
    the units stay where they are.

    Source: Ainsworth, Hayase and Srinivasa, arXiv 2209.04836, section 3.2 (weight matching);
    nested where heads share keys and values, which the paper has not.
    """
    import numpy as np

    fine, norms, weights = _sum_slots(group.fine, group.units, group, read, tick)
    coarse, more, _ = _sum_slots(group.coarse, group.outer, group, read, tick)
    before = float(np.trace(fine, dtype=np.float64) + np.trace(coarse, dtype=np.float64))
    outer, order = _nested(fine, coarse, group.inner)
    after = _total(fine, order) + _total(coarse, outer)
    if not after > before:
        outer, order, after = np.arange(group.outer), np.arange(group.units), before
    scale = ((norms[0] + more[0]) * (norms[1] + more[1])) ** 0.5 or 1.0
    return Matched(
        fine=order,
        coarse=outer,
        before=before / scale,
        after=after / scale,
        gain=after - before,
        weights=weights,
    )


def _total(gains: "Matrix", order: "Order") -> float:
    import numpy as np

    return float(gains[np.arange(len(order)), order].sum(dtype=np.float64))


def _nested(fine: "Matrix", coarse: "Matrix", inner: int) -> "tuple[Order, Order]":
    """Match coarse units on what their fine ones gain at best; return coarse and fine orders."""
    import numpy as np

    n = len(coarse)
    if n == 1:
        return np.zeros(1, np.int64), assign(fine)
    if inner == 1:
        outer = assign(fine + coarse)
        return outer, outer
    inside = np.empty((n, n, inner), np.int64)
    sums = np.array(coarse, dtype=np.float64)
    blocks = fine.reshape(n, inner, n, inner)
    for here, there in np.ndindex(n, n):
        block = blocks[here, :, there]
        inside[here, there] = assign(block)
        sums[here, there] += _total(block, inside[here, there])
    outer = assign(sums)
    return outer, np.concatenate([p * inner + inside[n, p] for n, p in enumerate(outer)])


def _sum_slots(
    slots: Sequence[Slot | Spread], units: int, group: Group, read: ReadRows, tick: Tick
) -> "tuple[Matrix, tuple[float, float], tuple[float, ...]]":
    """Return gains [reference's units, model's units], both squared norms, and weights."""
    import torch

    dtype = torch.float64 if units <= FINE else torch.float32
    total = torch.zeros(units, units, dtype=dtype)
    squares, weights = [0.0, 0.0], []
    for slot in slots:
        own = torch.zeros_like(total) if group.balanced else total
        norms = [0.0, 0.0]
        for pair in _pairs(slot, units, read):
            blocks = [block.float() for block in pair]
            own.add_(blocks[0] @ blocks[1].T, alpha=slot.weight)
            for n, block in enumerate(blocks):
                norms[n] += float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
        weight = slot.weight
        if group.balanced:
            weight /= (norms[0] * norms[1]) ** 0.5 or 1.0
            total.add_(own, alpha=weight / slot.weight)
        weights.append(weight)
        squares = [s + weight * norm for s, norm in zip(squares, norms, strict=True)]
        tick(slot.nbytes)
    return total.numpy(), (squares[0], squares[1]), tuple(weights)


def _pairs(slot: Slot | Spread, units: int, read: ReadRows) -> "Pairs":
    """Yield the same part of both models' units, [units, at most DEEP of their numbers]."""
    if isinstance(slot, Spread):
        found = zip(_apart(slot.others, read), _apart(slot.tensors, read), strict=True)
    else:
        pieces = _columns if slot.axis else _rows
        both = (pieces(slot, tensor, units, read) for tensor in (slot.other, slot.tensor))
        found = zip(*both, strict=True)
    for theirs, ours in found:
        for at in range(0, ours.shape[1], DEEP):
            yield theirs[:, at : at + DEEP], ours[:, at : at + DEEP]


def _apart(tensors: Sequence[TensorInfo], read: ReadRows) -> "Iterator[torch.Tensor]":
    """Units have a tensor each: rows of all of them are read a few at a time."""
    import torch

    rows = rows_of(tensors[0])
    columns = max(tensors[0].numel // max(rows, 1), 1)
    step = max(1, BLOCK // (columns * len(tensors)))
    for at in range(0, rows, step):
        count = min(step, rows - at)
        yield torch.stack([read(tensor, at, count).reshape(-1) for tensor in tensors])


def _rows(slot: Slot, tensor: TensorInfo, units: int, read: ReadRows) -> "Iterator[torch.Tensor]":
    """Units lie along the rows: all are held, as they are stored."""
    lines = (units - 1) * slot.stride + slot.width
    found = read(tensor, slot.offset, lines).reshape(lines, -1)
    yield _picked(found, slot, units).reshape(units, -1)


def _columns(
    slot: Slot, tensor: TensorInfo, units: int, read: ReadRows
) -> "Iterator[torch.Tensor]":
    """Units lie along the columns: rows are read a few at a time."""
    stop = slot.offset + (units - 1) * slot.stride + slot.width
    total = rows_of(tensor)
    step = max(1, min(DEEP // slot.width, BLOCK // max(tensor.shape[-1], 1)))
    for at in range(0, total, step):
        found = read(tensor, at, min(step, total - at))[:, slot.offset : stop]
        yield _picked(found.T, slot, units).reshape(units, -1)


def _picked(lines: "torch.Tensor", slot: Slot, units: int) -> "torch.Tensor":
    """Pick each unit's lines out of those of several roles that alternate."""
    import torch

    if slot.width == slot.stride:
        return lines
    to = torch.arange(units)[:, None] * slot.stride + torch.arange(slot.width)
    return lines.index_select(0, to.reshape(-1))
