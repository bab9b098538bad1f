"""Parts of stored tensors: other shapes of the same bytes, runs of rows, what was read last."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from typing import Any

from surgery.checkpoint import TensorInfo, View, make_view, read_rows, row_shape, rows_of

KEPT = 2  # parts that are kept at once


def flat(tensor: TensorInfo, columns: int) -> TensorInfo:
    """Return the same bytes as a matrix of so many columns."""
    return replace(tensor, shape=(tensor.numel // columns, columns))


def run_of_rows(tensor: TensorInfo, start: int, count: int, *, label: str) -> TensorInfo:
    """Return consecutive rows of a tensor as one of its own, [count, columns].

    What is stored stays stored: its place in the file is that of the rows.

    Args:
        label: told in its name, in brackets; the name of a part tells it from the whole.
    """
    shape = (count, *row_shape(tensor.shape))
    name = f"{tensor.name}[{label}]"
    if isinstance(tensor, View):
        return make_view(
            name,
            dtype=tensor.dtype,
            shape=shape,
            stored=tensor.stored,
            make=lambda read, at, n: read_rows(read, tensor, start + at, n),
            why=tensor.why,
            key=f"{tensor.key} {start}+{count}",
            held=tensor.held,
        )
    row = tensor.nbytes // max(rows_of(tensor), 1)
    return TensorInfo(
        name, tensor.dtype, shape, tensor.file, tensor.offset + start * row, count * row
    )


def rows_from(start: int, count: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Cut a run of rows where one matrix of `size` rows ends: (matrix, first row, rows)."""
    while count:
        matrix, inside = divmod(start, size)
        taken = min(count, size - inside)
        yield matrix, inside, taken
        start, count = start + taken, count - taken


class Recent:
    """Keeps the parts that were made last, for rows that lie all over a part.

    Several threads read rows of the same part at about the same time; one of them makes it.
    """

    def __init__(self, size: int = KEPT) -> None:
        self._size = size
        self._kept: OrderedDict[Hashable, tuple[threading.Lock, list[Any]]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:  # noqa: ANN401 - what it makes
        """Return the part of that key, made now or lately."""
        with self._lock:
            own, found = self._kept.setdefault(key, (threading.Lock(), []))
            self._kept.move_to_end(key)
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)
        with own:
            if not found:
                found.append(make())
            return found[0]
