"""New tables of tokens from the rows of an old one, made row by row when they are read."""

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from growth.vocab.choices import Init
from surgery.checkpoint import TensorInfo, make_view, read_rows, rows_of
from surgery.checkpoint.view import MakeRows, ReadRows
from surgery.errors import CheckpointError
from surgery.vocabulary.permute import BLOCK, FLOATS, gather
from surgery.vocabulary.rows import Numbers

if TYPE_CHECKING:
    import torch

    Fetch = Callable[[Numbers], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRows:
    """Where each row of a new table comes from.

    Attributes:
        copy: [rows] the old row that is taken as it is, or -1.
        pieces: new row to the old rows that it is the mean of.
        rest: what the others are: the mean of the old rows, zeros, or normal noise with the
            mean and the deviation of each column.
        known: the old rows before this one are what means and deviations are of.
        seed: of the noise.
    """

    copy: Numbers
    pieces: Mapping[int, Sequence[int]]
    rest: Init = "mean"
    known: int
    seed: int = 0

    def is_identity(self, rows: int) -> bool:
        """Whether a table of `rows` rows stays as it is."""
        return len(self.copy) == rows and bool((self.copy == np.arange(rows)).all())

    def digest(self, label: str) -> str:
        """Return what tells two maps apart."""
        told = repr((sorted(self.pieces.items()), self.rest, self.known, self.seed, label))
        return hashlib.sha256(self.copy.tobytes() + told.encode()).hexdigest()

    def counts(self) -> dict[str, int]:
        """Return how many rows are copies, means of pieces, and of the remaining kind."""
        copies = int((self.copy >= 0).sum())
        left = len(self.copy) - copies - len(self.pieces)
        return {"copied": copies, "mean of pieces": len(self.pieces), self.rest: left}


def resized_table(tensor: TensorInfo, rows: NewRows, *, axis: int, label: str) -> TensorInfo:
    """Return a table with new rows; the tensor itself where nothing changes.

    Shapes: [old rows, ...] gives [new rows, ...]; with `axis=1`, [1, old] gives [1, new].

    Args:
        label: what noise is seeded by beside the row.

    Raises:
        CheckpointError: the table is not stored as floats.
    """
    if rows.is_identity(tensor.shape[axis]):
        return tensor
    check_floats(tensor)
    size = len(rows.copy)
    return make_view(
        tensor.name,
        dtype=tensor.dtype,
        shape=(1, size) if axis else (size, *tensor.shape[1:]),
        stored=[tensor],
        make=_columns(tensor, rows, label) if axis else _rows(tensor, rows, label),
        why="vocabulary",
        key=rows.digest(label),
    )


def check_floats(tensor: TensorInfo) -> None:
    """Refuse a table whose rows cannot be made.

    Raises:
        CheckpointError: it is quantised.
    """
    if tensor.dtype not in FLOATS:
        fact = f"{tensor.name!r} is stored as {tensor.dtype}, whose rows cannot be made anew"
        raise CheckpointError(tensor.file, fact, "dequantise the model first")


def _rows(tensor: TensorInfo, rows: NewRows, label: str) -> MakeRows:
    moments = _Moments(tensor, rows.known)

    def make(read: ReadRows, start: int, count: int) -> "torch.Tensor":
        def fetch(wanted: Numbers) -> "torch.Tensor":
            return gather(read, tensor, wanted)

        shape = (count, *tensor.shape[1:])
        return _assemble(
            rows, start, shape, fetch=fetch, moments=lambda: moments.of(read), label=label
        )

    return make


def _columns(tensor: TensorInfo, rows: NewRows, label: str) -> MakeRows:
    def make(read: ReadRows, start: int, count: int) -> "torch.Tensor":  # noqa: ARG001 - one row
        import torch

        line: torch.Tensor = read_rows(read, tensor, 0, 1)[0]
        known = line[: rows.known].double()

        def fetch(wanted: Numbers) -> "torch.Tensor":
            return line[torch.from_numpy(wanted)]

        moments = known.mean(), known.std(correction=0)
        return _assemble(
            rows, 0, (len(rows.copy),), fetch=fetch, moments=lambda: moments, label=label
        )[None]

    return make


def _assemble(
    rows: NewRows,
    start: int,
    shape: tuple[int, ...],
    *,
    fetch: "Fetch",
    moments: "Callable[[], tuple[torch.Tensor, torch.Tensor]]",
    label: str,
) -> "torch.Tensor":
    """Put a run of new rows together: [rows, ...], in the stored dtype or in float64."""
    import torch

    copy = rows.copy[start : start + shape[0]]
    here = np.flatnonzero(copy >= 0)
    if len(here) == len(copy):
        return fetch(copy)
    out = torch.zeros(shape, dtype=torch.float64)
    if len(here):
        out[torch.from_numpy(here)] = fetch(copy[here]).double()
    for at in np.flatnonzero(copy < 0).tolist():
        pieces = rows.pieces.get(start + at)
        if pieces is not None:
            out[at] = fetch(np.array(pieces, np.int64)).double().mean(dim=0)
        elif rows.rest != "zero":
            mean, deviation = moments()
            out[at] = mean
            if rows.rest == "random":
                out[at] += deviation * _noise(f"{rows.seed}\0{label}\0{start + at}", mean.shape)
    return out


def _noise(seed: str, shape: Sequence[int]) -> "torch.Tensor":
    """Return normal numbers that depend on the seed alone."""
    import torch

    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:16], "little")
    made = np.random.Generator(np.random.PCG64(number)).standard_normal(tuple(shape))
    return torch.as_tensor(made)


class _Moments:
    """Mean and standard deviation of a table's columns, computed when first asked for."""

    def __init__(self, tensor: TensorInfo, known: int) -> None:
        self._tensor, self._known = tensor, known
        self._lock = threading.Lock()
        self._found: tuple[torch.Tensor, torch.Tensor] | None = None

    def of(self, read: ReadRows) -> "tuple[torch.Tensor, torch.Tensor]":
        """Return two [...]: float64."""
        with self._lock:
            if self._found is None:
                self._found = self._compute(read)
            return self._found

    def _compute(self, read: ReadRows) -> "tuple[torch.Tensor, torch.Tensor]":
        import torch

        step = max(BLOCK * rows_of(self._tensor) // max(self._tensor.nbytes, 1), 1)
        total = torch.zeros(self._tensor.shape[1:], dtype=torch.float64)
        squares = torch.zeros_like(total)
        for start in range(0, self._known, step):
            size = min(step, self._known - start)
            block = read_rows(read, self._tensor, start, size).double()
            total += block.sum(dim=0)
            squares += block.square().sum(dim=0)
        mean = total / self._known
        return mean, (squares / self._known - mean.square()).clamp(min=0).sqrt()
