"""Stored tensors that are read when they are indexed: a step of one worker, in little memory."""

import math
from collections.abc import Iterator
from dataclasses import replace
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import BITS, TensorInfo, View, read_rows, row_shape, rows_of
from surgery.compute import as_tensor, store, stored_reader, use_one_thread
from surgery.digest import Leaves
from surgery.errors import ResultError
from surgery.plan import Step, Tell, TensorSpec
from surgery.slices import CHUNK, Sources

if TYPE_CHECKING:
    import torch

    Index = int | slice | EllipsisType | tuple[slice, slice]


class Stored:
    """A tensor on disk that gives floats for what is indexed, and holds nothing.

    `t[3]` is the fourth entry along the first axis, itself unread; `t[5:9]` reads rows,
    `t[5:9, 2:4]` columns of them, and `t[...]` all. Slices have no step.
    """

    def __init__(self, tensor: TensorInfo, sources: Sources, width: int) -> None:
        self.shape = tensor.shape
        self._tensor, self._sources, self._width = tensor, sources, width

    @property
    def dtype(self) -> "torch.dtype":
        """What is given."""
        import torch

        double = self._width == 8 or self._tensor.dtype == "F64"  # noqa: PLR2004 - bytes
        return torch.float64 if double else torch.float32

    def __getitem__(self, index: "Index") -> Any:  # noqa: ANN401 - Stored or Tensor
        import torch

        if isinstance(index, int):
            return Stored(_entry(self._tensor, index), self._sources, self._width)
        if index is ...:
            return self[:].reshape(self.shape) if self.shape else self._rows(0, 1)[0].to(self.dtype)
        first, columns = index if isinstance(index, tuple) else (index, slice(None))
        start, stop, _ = first.indices(self.shape[0])
        each = rows_of(self._tensor) // max(self.shape[0], 1)
        row = row_shape(self.shape)
        wanted = [len(range(*columns.indices(row[0])))] if row else []
        found = torch.empty(((stop - start) * each, *wanted), dtype=self.dtype)
        step = max(CHUNK // max(math.prod(row) * self._width, 1), 1)
        for at in range(0, len(found), step):
            size = min(step, len(found) - at)
            read = self._rows(start * each + at, size)
            found[at : at + size] = read[:, columns] if row else read
        return found.view(stop - start, *self.shape[1:-1], *wanted)

    def _rows(self, start: int, count: int) -> "torch.Tensor":
        read = stored_reader(self._sources)
        found: torch.Tensor = read_rows(read, self._tensor, start, count)
        return found


def _entry(tensor: TensorInfo, number: int) -> TensorInfo:
    """Return one entry along the first axis of a tensor of three axes or more."""
    shape = tensor.shape[1:]
    rows = rows_of(tensor) // tensor.shape[0]
    size = math.prod(shape) * BITS[tensor.dtype] // 8
    if not isinstance(tensor, View):
        return replace(tensor, shape=shape, offset=tensor.offset + number * size, nbytes=size)

    def make(read: Any, start: int, count: int) -> Any:  # noqa: ANN401 - as the view's own
        return read_rows(read, tensor, number * rows + start, count)

    return replace(tensor, shape=shape, nbytes=size, make=make)


def stream(
    step: Step, sources: Sources, digests: dict[int, Leaves], told: dict[str, float]
) -> Iterator[tuple[str, memoryview]]:
    """Apply a streamed step's function; yield its outputs' names and bytes, chunk by chunk.

    Args:
        digests: by input, fed before anything is computed.
        told: takes the figures that the function tells.

    Raises:
        ResultError: a result is not finite, or has another size than planned.
    """
    use_one_thread()
    for slot, hashed in digests.items():
        _feed(step.inputs[slot], sources, hashed)
    assert step.fn is not None  # noqa: S101 - told by the caller
    made = step.fn(*(Stored(tensor, sources, step.width) for tensor in step.inputs))
    blocks = _blocks(iter(made), told)
    for name, spec in step.outputs:
        for view in _chunks(blocks, name, spec):
            yield name, view
    more = sum(block.numel() for block in blocks)
    if more:
        name, spec = step.outputs[-1]
        fact = f"came out with {spec.numel + more} elements, planned were {spec.numel}"
        raise ResultError(name, fact)


def _blocks(made: Iterator[Any], told: dict[str, float]) -> Iterator[Any]:
    for block in made:
        if isinstance(block, Tell):
            told.update(block.figures)
        else:
            yield block


def _chunks(blocks: Iterator[Any], name: str, spec: TensorSpec) -> Iterator[memoryview]:
    """Round the blocks of one output; cut its bytes into chunks."""
    given, data = 0, bytearray()
    while given < spec.numel and (block := next(blocks, None)) is not None:
        whole_block = block.reshape(-1)
        for start in range(0, whole_block.numel(), CHUNK):
            flat = whole_block[start : start + CHUNK]
            given += flat.numel()
            room = bytearray(flat.numel() * BITS[spec.dtype] // 8)
            store(as_tensor(memoryview(room), spec.dtype), flat, name)
            data += room
            whole = len(data) // CHUNK * CHUNK
            yield from (memoryview(data[at : at + CHUNK]) for at in range(0, whole, CHUNK))
            data = data[whole:]
    if given != spec.numel:
        raise ResultError(name, f"came out with {given} elements, planned were {spec.numel}")
    if data:
        yield memoryview(data)


def _feed(tensor: TensorInfo, sources: Sources, hashed: Leaves) -> None:
    buffer = memoryview(bytearray(min(CHUNK, tensor.nbytes)))
    for at in range(0, tensor.nbytes, CHUNK):
        view = buffer[: min(CHUNK, tensor.nbytes - at)]
        sources.read(tensor, at, view)
        hashed.feed(view)
