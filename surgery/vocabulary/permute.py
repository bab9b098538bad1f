"""Tables of tokens in the order of another vocabulary, made row by row when they are read."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.checkpoint import TensorInfo, make_view, read_rows, rows_of
from surgery.checkpoint.view import MakeRows, ReadRows
from surgery.errors import CheckpointError
from surgery.vocabulary.rows import AVERAGE, MEAN, Numbers, RowMap

if TYPE_CHECKING:
    import torch

FLOATS = ("F16", "BF16", "F32", "F64")
WIDE = ("F32", "F64")  # averages of these are computed in float64, of others in float32
BLOCK = 1 << 20  # bytes read at once for a mean


def permuted(
    tensor: TensorInfo, row_map: RowMap, tables: Mapping[int, TensorInfo], *, axis: int = 0
) -> TensorInfo:
    """Return a table with its rows in the new order; the tensor itself where nothing changes.

    Shapes: [rows, ...] gives [row_map.size, ...]; with `axis=1`, [1, rows] gives [1, size].
    Runs of rows that stand together are read at once, and nothing else is held.

    Args:
        tables: of every model that the map takes rows from, by its place; one that is missing
            gives zeros.

    Raises:
        CheckpointError: the table is not stored as floats, or those of other models have other
            columns.
    """
    if row_map.is_identity(tensor.shape[axis]):
        return tensor
    used = [number for number in row_map.models() if number in tables]
    for number in used:
        _check(tensor, tables[number], axis)
    codes = {tables[number].dtype for number in used}
    wide = bool(codes & {*WIDE})
    make = _columns if axis else _rows
    shape = (1, row_map.size) if axis else (row_map.size, *tensor.shape[1:])
    return make_view(
        tensor.name,
        dtype=tensor.dtype,
        shape=shape,
        stored=[tables[number] for number in used],
        make=make(tensor, row_map, tables, wide=wide),
        why="vocabulary",
        key=row_map.digest(),
    )


def _check(tensor: TensorInfo, other: TensorInfo, axis: int) -> None:
    if other.dtype not in FLOATS:
        fact = f"{other.name!r} is stored as {other.dtype}, whose rows cannot be moved"
        raise CheckpointError(other.file, fact, "dequantise the model first")
    if not axis and other.shape[1:] != tensor.shape[1:]:
        fact = (
            f"{other.name!r} has rows of {list(other.shape[1:])}, others {list(tensor.shape[1:])}"
        )
        raise CheckpointError(other.file, fact, "only models of one width share their rows")


def _rows(
    tensor: TensorInfo, row_map: RowMap, tables: Mapping[int, TensorInfo], *, wide: bool
) -> MakeRows:
    mean = _Mean(tensor, wide=wide)

    def make(read: ReadRows, start: int, count: int) -> "torch.Tensor":
        def fetch(number: int, rows: Numbers) -> "torch.Tensor":
            return gather(read, tables[number], rows)

        shape = (count, *tensor.shape[1:])
        part = slice(start, start + count)
        sources = _Sources(tables, fetch, lambda: mean.of(read), wide)
        return _assemble(row_map, part, shape, sources)

    return make


def _columns(
    tensor: TensorInfo, row_map: RowMap, tables: Mapping[int, TensorInfo], *, wide: bool
) -> MakeRows:
    def make(read: ReadRows, start: int, count: int) -> "torch.Tensor":  # noqa: ARG001 - one row
        def fetch(number: int, rows: Numbers) -> "torch.Tensor":
            import torch

            found: torch.Tensor = read_rows(read, tables[number], 0, 1)[0]
            return found[torch.from_numpy(rows)]

        def mean() -> "torch.Tensor":
            found: torch.Tensor = read_rows(read, tensor, 0, 1)
            return found.double().mean()

        part = slice(0, row_map.size)
        whole = _assemble(row_map, part, (row_map.size,), _Sources(tables, fetch, mean, wide))
        return whole[None]

    return make


@dataclass(frozen=True, slots=True)
class _Sources:
    """What rows are made of.

    Attributes:
        tables: per model its table; rows of the others are zeros.
        fetch: gives rows of a model's table, by its place.
        mean: gives the mean of all own rows.
        wide: compute in float64 rather than float32.
    """

    tables: Mapping[int, TensorInfo]
    fetch: "Callable[[int, Numbers], torch.Tensor]"
    mean: "Callable[[], torch.Tensor]"
    wide: bool


def _assemble(
    row_map: RowMap, part: slice, shape: tuple[int, ...], sources: _Sources
) -> "torch.Tensor":
    """Put a run of rows together: [rows, ...], in the stored dtype or as floats."""
    import torch

    pick, row = row_map.pick[part], row_map.row[part]
    if pick[0] in sources.tables and (pick == pick[0]).all():
        return sources.fetch(int(pick[0]), row)  # the usual case
    out = torch.zeros(shape, dtype=torch.float64 if sources.wide else torch.float32)
    for number in np.unique(pick).tolist():
        at = np.flatnonzero(pick == number)
        place = _place(at)
        if number == AVERAGE:
            out[place] = _average(row_map.own[:, part][:, at], sources, out)
        elif number == MEAN:
            out[place] = sources.mean().to(out.dtype)
        elif number in sources.tables:
            out[place] = sources.fetch(number, row[at]).to(out.dtype)
    return out


def _average(own: Numbers, sources: _Sources, like: "torch.Tensor") -> "torch.Tensor":
    """Return the mean over the models that have each row; models in order, so that it is fixed."""
    import torch

    total = like.new_zeros((own.shape[1], *like.shape[1:]))
    count = np.zeros(own.shape[1], np.int64)
    for number in sorted(sources.tables):
        at = np.flatnonzero(own[number] >= 0)
        if len(at):
            total[_place(at)] += sources.fetch(number, own[number][at]).to(like.dtype)
            count[at] += 1
    divisor = torch.from_numpy(np.maximum(count, 1)).to(like.dtype)
    return total / divisor.view(-1, *[1] * (total.dim() - 1))


def gather(read: ReadRows, tensor: TensorInfo, rows: Numbers) -> "torch.Tensor":
    """Return rows of a table in any order; each run that stands together there is read once."""
    import torch

    order = np.argsort(rows, kind="stable")
    ascending = rows[order]
    starts = np.flatnonzero(np.diff(ascending, prepend=-2) > 1)
    ends = np.append(starts[1:], len(rows)) - 1
    runs = zip(ascending[starts].tolist(), ascending[ends].tolist(), strict=True)
    blocks = [read_rows(read, tensor, first, last - first + 1) for first, last in runs]
    found = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    if np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
        return found
    kept = np.cumsum(np.diff(ascending, prepend=ascending[0]) > 0)  # a row may be asked for twice
    back = np.empty_like(order)
    back[order] = kept
    return found[torch.from_numpy(back)]


def _place(at: Numbers) -> Any:  # noqa: ANN401 - an index of torch's
    """Return a slice where places follow one another, which is faster than an index."""
    import torch

    if at[-1] - at[0] + 1 == len(at):
        return slice(int(at[0]), int(at[-1]) + 1)
    return torch.from_numpy(at)


class _Mean:
    """The mean of all rows of a table, computed when first asked for, block by block."""

    def __init__(self, tensor: TensorInfo, *, wide: bool) -> None:
        self._tensor, self._wide = tensor, wide
        self._lock = threading.Lock()
        self._found: torch.Tensor | None = None

    def of(self, read: ReadRows) -> "torch.Tensor":
        """Return [...]: float64."""
        with self._lock:
            if self._found is None:
                self._found = self._compute(read)
            return self._found

    def _compute(self, read: ReadRows) -> "torch.Tensor":
        import torch

        rows = rows_of(self._tensor)
        step = max(BLOCK * rows // max(self._tensor.nbytes, 1), 1)
        total = torch.zeros(self._tensor.shape[1:], dtype=torch.float64)
        for start in range(0, rows, step):
            block = read_rows(read, self._tensor, start, min(step, rows - start))
            total += block.double().sum(dim=0)
        return total / rows
