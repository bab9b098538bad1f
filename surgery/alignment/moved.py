"""Tensors with rows and columns in another order, read as views."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import TensorInfo, make_view, rows_of
from surgery.checkpoint.view import ReadRows
from surgery.pieces import rows_from

if TYPE_CHECKING:
    import numpy as np
    import torch

    Order = np.ndarray[Any, np.dtype[np.int64]]

SMALL = 1 << 16  # bytes of a tensor that is read whole rather than row by row


def reordered(
    tensor: TensorInfo, *, rows: "Order | None" = None, columns: "Order | None" = None
) -> TensorInfo:
    """Return the tensor with row p read from rows[p], and column p from columns[p].

    The numbers keep their dtype: what is written has the same bits.
    """
    rows, columns = (None if _is_identity(order) else order for order in (rows, columns))
    if rows is None and columns is None:
        return tensor

    def make(read: ReadRows, start: int, count: int) -> "torch.Tensor":
        found = _gather(read, tensor, rows, start, count)
        return found if columns is None else found[:, columns]

    return make_view(
        tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        stored=(tensor,),
        make=make,
        why="permute",
        key=digest(_order_or_none(order) for order in (rows, columns)),
        held=SMALL,
    )


def stacked(name: str, parts: Sequence[TensorInfo], shape: tuple[int, ...]) -> TensorInfo:
    """Return matrices of equal shapes, one above the other, as one tensor."""
    size = rows_of(parts[0])

    def make(read: ReadRows, start: int, count: int) -> "torch.Tensor":
        import torch

        pieces = rows_from(start, count, size)
        return torch.cat([read(parts[n], at, k) for n, at, k in pieces])

    told = "\n".join(part.name + getattr(part, "key", "") for part in parts)
    return make_view(
        name,
        dtype=parts[0].dtype,
        shape=shape,
        stored=parts,
        make=make,
        why="permute",
        key=hashlib.sha256(told.encode()).hexdigest(),
        held=SMALL,
    )


def digest(orders: "Iterable[Order]") -> str:
    """Return what tells permutations apart."""
    total = hashlib.sha256()
    for order in orders:
        total.update(len(order).to_bytes(8, "little"))
        total.update(order.astype("<i8").tobytes())
    return total.hexdigest()


def _order_or_none(order: "Order | None") -> "Order":
    import numpy as np

    return np.empty(0, np.int64) if order is None else order


def _is_identity(order: "Order | None") -> bool:
    import numpy as np

    return order is None or bool((order == np.arange(len(order))).all())


def _gather(
    read: ReadRows, tensor: TensorInfo, rows: "Order | None", start: int, count: int
) -> "torch.Tensor":
    import torch

    if rows is None:
        found: torch.Tensor = read(tensor, start, count)
        return found
    wanted = rows[start : start + count]
    if tensor.nbytes <= SMALL:
        found = read(tensor, 0, rows_of(tensor))
        return found[torch.from_numpy(wanted)]
    return torch.cat([read(tensor, first, run) for first, run in _runs(wanted)])


def _runs(wanted: "Order") -> list[tuple[int, int]]:
    """Return runs of consecutive rows: (first, rows)."""
    import numpy as np

    ends = [*(np.flatnonzero(np.diff(wanted) != 1) + 1).tolist(), len(wanted)]
    starts = [0, *ends[:-1]]
    return [(int(wanted[a]), b - a) for a, b in zip(starts, ends, strict=True)]
