"""A tensor that is made when it is read: dequantised, permuted, an adapter added, experts fused."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from surgery.checkpoint.header import BITS, TensorInfo

# Takes a stored tensor, a first row and a number of rows; gives them as a torch tensor in the
# stored dtype, [rows, *row_shape]. Rows run along the first axis; of three axes or more, along all
# but the last (experts that are stored as one are large). A tensor without axes has one row.
ReadRows = Callable[[TensorInfo, int, int], Any]
# Takes a ReadRows, a first row and a number of rows; gives the view's rows as a float tensor.
MakeRows = Callable[[ReadRows, int, int], Any]


@dataclass(frozen=True, slots=True)
class View(TensorInfo):
    """A tensor computed row by row from stored ones; it stands wherever a stored one does.

    `dtype` is what it counts as, `file` and `offset` are those of the first stored tensor.

    Attributes:
        stored: every tensor that `make` reads.
        make: gives any run of rows; must not depend on how the rows are grouped.
        why: what is done, in a word or two, for `--dry-run`.
        key: tells two ways of making it apart, for the plan's fingerprint.
        held: bytes that `make` holds at once beside what it reads and gives.
    """

    stored: tuple[TensorInfo, ...] = ()
    make: MakeRows = lambda *_: None
    why: str = "made"
    key: str = ""
    held: int = 0


def make_view(
    name: str,
    *,
    dtype: str,
    shape: tuple[int, ...],
    stored: Iterable[TensorInfo],
    make: MakeRows,
    why: str,
    key: str = "",
    held: int = 0,
) -> View:
    """Return a view; see `View` for the arguments."""
    parts = tuple(part for tensor in stored for part in stored_tensors(tensor))
    nbytes = math.prod(shape) * BITS[dtype] // 8
    first = parts[0]
    return View(name, dtype, shape, first.file, first.offset, nbytes, parts, make, why, key, held)


def stored_tensors(tensor: TensorInfo) -> tuple[TensorInfo, ...]:
    """Return what lies on disk for a tensor: itself, or what a view is made of."""
    return tensor.stored if isinstance(tensor, View) else (tensor,)


def rows_of(tensor: TensorInfo) -> int:
    """Return the number of rows, as `ReadRows` counts them."""
    return math.prod(tensor.shape[: len(tensor.shape) - len(row_shape(tensor.shape))])


def row_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of one row of a tensor of that shape."""
    return shape[1:] if len(shape) <= 2 else shape[-1:]  # noqa: PLR2004 - a matrix


def read_rows(read: ReadRows, tensor: TensorInfo, start: int, count: int) -> Any:  # noqa: ANN401
    """Return rows of a stored tensor or of a view, whichever it is; views may nest."""
    made = tensor.make(read, start, count) if isinstance(tensor, View) else None
    return read(tensor, start, count) if made is None else made
