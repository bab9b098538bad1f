"""Cut steps into work items, and read sources piece by piece."""

import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from surgery.checkpoint import BITS, Checkpoint, TensorInfo, stamp
from surgery.digest import LEAF
from surgery.errors import StepError
from surgery.plan import Step
from surgery.preflight import CHUNK


@dataclass(frozen=True, slots=True)
class Item:
    """A piece of one step: `count` bytes of a copy, or elements of an elementwise step.

    A step that is not sliced is one item. `weight` is how many bytes of output it stands for.
    """

    step: int
    start: int
    count: int
    weight: int


def cut(number: int, step: Step) -> list[Item]:
    """Cut one step into items whose pieces start on digest leaves in every tensor."""
    if not step.is_sliced or (step.fn is None and not step.inputs):
        return [Item(number, 0, -1, step.bytes_out)]
    total, piece = step.outputs[0][1].nbytes, CHUNK
    if step.elementwise:
        # LEAF elements of 1 byte fill a leaf; wider dtypes then fill whole leaves too.
        total, piece = step.outputs[0][1].numel, max(CHUNK // _widest(step) // LEAF * LEAF, LEAF)
    counts = [(start, min(piece, total - start)) for start in range(0, total, piece)] or [(0, 0)]
    unit = step.bytes_out // total if total else 0
    return [Item(number, start, count, count * unit) for start, count in counts]


def _widest(step: Step) -> int:
    codes = [t.dtype for t in step.inputs] + [spec.dtype for _, spec in step.outputs]
    return max(BITS[code] for code in codes) // 8


class Scratch:
    """Page-aligned buffers of one thread, kept and reused."""

    def __init__(self) -> None:
        self._buffers: dict[int, mmap.mmap] = {}

    def take(self, slot: int, size: int) -> memoryview:
        """Return `size` bytes; what the slot held before is overwritten."""
        held = self._buffers.get(slot)
        if held is None or len(held) < size:
            held = self._buffers[slot] = mmap.mmap(-1, max(size, CHUNK))
        return memoryview(held)[:size]


class Sources:
    """The open input files of a run."""

    def __init__(self, checkpoints: Iterable[Checkpoint]) -> None:
        self._stamps = {file: mark for c in checkpoints for file, mark in c.stamps.items()}
        self._open: dict[Path, int] = {}
        self._kept = False

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
                got = os.preadv(self._open[tensor.file], [view[done:]], tensor.offset + at + done)
            except OSError as error:
                fact = f"reading {tensor.name!r} failed ({error.strerror})"
                raise StepError(tensor.file, fact) from error
            if got == 0:
                raise StepError(tensor.file, f"ends inside {tensor.name!r}", "copy it again")
            done += got

    def prefetch(self, tensor: TensorInfo, at: int, count: int) -> None:
        """Ask the kernel to read ahead."""
        _advise(self._open[tensor.file], tensor.offset + at, count, "POSIX_FADV_WILLNEED")


def _advise(fd: int, offset: int, count: int, advice: str) -> None:
    with suppress(AttributeError, OSError):  # advice only; macOS has none
        os.posix_fadvise(fd, offset, count, getattr(os, advice))


def pieces(size: int) -> Iterator[tuple[int, int]]:
    """Cut `size` bytes into chunks: (start, count)."""
    for start in range(0, size, CHUNK):
        yield start, min(CHUNK, size - start)
