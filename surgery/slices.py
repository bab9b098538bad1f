"""Cut steps into work items, and read sources piece by piece."""

import math
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from surgery.checkpoint import BITS, Checkpoint, TensorInfo, View, row_shape, stamp
from surgery.digest import LEAF
from surgery.errors import StepError
from surgery.plan import Part, Step

CHUNK = (
    1 << 20
)  # bytes of a work item (measured with 8 threads: as fast as 4 MiB, a quarter of the memory)
# Elements that a function is given at once: its temporaries stay in the core's own cache
# (measured: at 128 Ki a float64 dot product takes 14 times as long).
PART = 64 << 10
COMPUTED = LEAF  # bytes read at once of each tensor that is computed with: a leaf of its digest
CROWD = 8  # inputs up to which parts have their full size
SMALLEST = 16 << 10  # elements of a part that many inputs share the memory of
SAMPLE = 128  # blocks of a sample
BLOCK = 512  # elements of each, or one row
NOWAIT = getattr(os, "RWF_NOWAIT", 0)  # read only what is in memory; Linux has it
# Reads, all from memory, after which nothing is asked for ahead: at first, and after a slow one.
FEW, MANY = 64, 4096

Phase = Literal["copy", "zeros", "whole", "open", "sample", "pass", "map", "digest"]


@dataclass(frozen=True, slots=True)
class Item:
    """A piece of one step's work.

    Attributes:
        start, count: bytes of a copy or digest; elements of a pass or map.
        weight: how many bytes of progress it stands for.
        tensor: which stored tensor a digest is for.
    """

    step: int
    phase: Phase
    start: int = 0
    count: int = 0
    weight: int = 0
    tensor: int = 0


@dataclass(frozen=True, slots=True)
class Grid:
    """How a sliced step is cut; all in elements.

    Attributes:
        row: elements that stay together; 1 where any do.
        part: what the function sees at once.
        chunk: what is read at once.
        item: what a worker takes; it starts on a digest leaf in every tensor.
    """

    total: int
    row: int
    part: int
    chunk: int
    item: int

    def pieces(self, step: int, phase: Phase, unit: int) -> list[Item]:
        """Return the items of one reading; `unit` is the weight of an element."""
        starts = range(0, self.total, self.item) or (0,)
        counts = [(start, min(self.item, self.total - start)) for start in starts]
        return [Item(step, phase, start, count, count * unit) for start, count in counts]

    def parts(self, start: int, count: int) -> Iterator[Part]:
        """Return the parts of a chunk, which starts on a part."""
        for at in range(start, start + count, self.part):
            yield Part(at // self.part, at, min(self.part, start + count - at))

    def blocks(self) -> list[tuple[int, int]]:
        """Return the sample's places: evenly spread, off any period of the rows."""
        size = self.row if self.row > 1 else min(BLOCK, max(self.total, 1))
        slots = self.total // size
        if slots <= SAMPLE:
            return [(0, self.total)]
        golden = 0.6180339887498949
        jitter = [(n * golden) % 1.0 for n in range(SAMPLE)]
        return [(int((n + jitter[n]) * slots / SAMPLE) * size, size) for n in range(SAMPLE)]


def grid(step: Step) -> Grid:
    """Return how a sliced step is cut."""
    shape, total = step.outputs[0][1].shape, step.outputs[0][1].numel
    row = _row(step, shape, total)
    widths = [BITS[spec.dtype] // 8 for _, spec in step.outputs]
    widths += [BITS[t.dtype] // 8 for t in step.inputs if not isinstance(t, View)]
    # Nothing depends on the parts of an elementwise step: many inputs take smaller ones, so that
    # an average over a hundred checkpoints holds no more than one over eight.
    crowd = max(len(step.inputs) // CROWD, 1) if step.elementwise and row == 1 else 1
    part = part_size(row, max(PART // crowd, SMALLEST))
    chunk = max(COMPUTED // crowd // max(widths) // part, 1) * part
    leaf = LEAF // min(widths)
    item = math.lcm(leaf, part) if row > 1 else max(leaf, chunk)
    return Grid(total, row, part, chunk, -(-chunk // item) * item)


def _row(step: Step, shape: tuple[int, ...], total: int) -> int:
    """Elements that must stay together: rows of a matrix, and what views are made by."""
    if step.rows:
        return max(total // shape[0], 1) if len(shape) > 1 and shape[0] else max(total, 1)
    return max(math.prod(row_shape(shape)), 1) if step.has_views else 1


def part_size(row: int, most: int = PART) -> int:
    """Return how many elements a part has: rows by a power of two, so that items stay small."""
    return (1 << ((most // row).bit_length() - 1)) * row if row < most else row


def cut(number: int, step: Step) -> list[Item]:
    """Return the items that a step starts with."""
    if not step.inputs and step.fn is None:
        return [Item(number, "zeros", weight=step.bytes_out)]
    if step.is_copy:
        total = step.outputs[0][1].nbytes
        counts = [(s, min(CHUNK, total - s)) for s in range(0, total, CHUNK) or (0,)]
        return [Item(number, "copy", start, count, count) for start, count in counts]
    if step.passes:
        return [Item(number, "open")]
    return last_items(number, step)


def last_items(number: int, step: Step) -> list[Item]:
    """Return the items that write a step's outputs, and those that digest what views read."""
    weight = step.bytes_out // max(step.outputs[0][1].numel, 1)
    written = [Item(number, "whole", weight=step.bytes_out)]
    if step.is_sliced:
        written = grid(step).pieces(number, "map", weight)
    plain = {(t.file, t.name) for t in step.inputs if not isinstance(t, View)}
    for slot, tensor in enumerate(step.stored):
        if (tensor.file, tensor.name) not in plain:
            plain.add((tensor.file, tensor.name))
            starts = range(0, tensor.nbytes, CHUNK) or (0,)
            written += [
                Item(number, "digest", s, min(CHUNK, tensor.nbytes - s), tensor=slot)
                for s in starts
            ]
    return written


class Scratch:
    """Page-aligned buffers of one thread, kept and reused."""

    def __init__(self) -> None:
        self._buffers: dict[int, mmap.mmap] = {}
        self.floats: dict[tuple[int, Any], Any] = {}  # what `surgery.compute` widens into

    def take(self, slot: int, size: int) -> memoryview:
        """Return `size` bytes; what the slot held before is overwritten."""
        held = self._buffers.get(slot)
        if held is None or len(held) < size:
            held = self._buffers[slot] = mmap.mmap(-1, max(size, 1))
        return memoryview(held)[:size]


class Sources:
    """The open input files of a run."""

    def __init__(self, checkpoints: Iterable[Checkpoint]) -> None:
        self._stamps = {file: mark for c in checkpoints for file, mark in c.stamps.items()}
        self._open: dict[Path, int] = {}
        self._kept = False
        self._cold = FEW  # reads until the files count as held in memory

    def __enter__(self) -> "Sources":
        for file in self._stamps:
            try:
                fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as error:
                self.__exit__()
                raise StepError(file, f"cannot be opened ({error.strerror})") from error
            self._open[file] = fd
            _advise(fd, 0, 0, "POSIX_FADV_SEQUENTIAL")
        self.check_unchanged()
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._open.values() if not self._kept else ():
            os.close(fd)

    def leave_open(self) -> None:
        """Do not close the files on leaving: a thread that hangs may still read them."""
        self._kept = True

    def check_unchanged(self) -> None:
        """Make sure that every file is still what the plan was made from.

        Raises:
            StepError: a file was written to, replaced or removed meanwhile.
        """
        for file, mark in self._stamps.items():
            if not file.exists() or stamp(file) != mark:
                fact = "changed while it was read"
                raise StepError(file, fact, "let the other program finish, then run again")

    def read(self, tensor: TensorInfo, at: int, view: memoryview) -> None:
        """Fill `view` with the tensor's bytes from `at` on.

        Raises:
            StepError: the disk fails, or the file ends early.
        """
        done = 0
        while done < len(view):
            try:
                got = self._read_some(tensor.file, tensor.offset + at + done, view[done:])
            except OSError as error:
                fact = f"reading {tensor.name!r} failed ({error.strerror})"
                raise StepError(tensor.file, fact) from error
            if got == 0:
                raise StepError(tensor.file, f"ends inside {tensor.name!r}", "copy it again")
            done += got

    def _read_some(self, file: Path, offset: int, view: memoryview) -> int:
        """Read, and note whether the disk was needed."""
        fd = self._open[file]
        with suppress(OSError):  # nothing is in memory, or the file system cannot tell
            if NOWAIT and (got := os.preadv(fd, [view], offset, NOWAIT)):
                self._cold -= self._cold > 0
                return got
        self._cold = MANY
        return os.preadv(fd, [view], offset)

    def prefetch(self, tensor: TensorInfo, at: int, count: int) -> None:
        """Ask the kernel to read ahead, unless reads have long found everything in memory.

        The kernel looks up every page that it is asked for (measured: a tenth of the CPU time of
        a merge of files that are all in memory).
        """
        if self._cold > 0:
            _advise(self._open[tensor.file], tensor.offset + at, count, "POSIX_FADV_WILLNEED")


def _advise(fd: int, offset: int, count: int, advice: str) -> None:
    with suppress(AttributeError, OSError):  # advice only; macOS has none
        os.posix_fadvise(fd, offset, count, getattr(os, advice))


def pieces(size: int) -> Iterator[tuple[int, int]]:
    """Cut `size` bytes into chunks: (start, count)."""
    for start in range(0, size, CHUNK):
        yield start, min(CHUNK, size - start)
