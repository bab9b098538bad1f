"""The physical limit: a bare loop that reads an input and durably writes an output.

The loop does what no tool can avoid and nothing else: every input byte is read once, every output
byte is written once (a stacked layer twice, from one read), no hash, no arithmetic, no naming.
Threads share a list of chunks; each has one page-aligned buffer, reads with preadv, writes with
O_DIRECT into a preallocated file; one fdatasync ends it.
"""

import argparse
import errno
import itertools
import json
import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

PAGE = 4096
MIB = 1 << 20
THREADS = (1, 2, 4)
CHUNKS = (1 * MIB, 4 * MIB, 8 * MIB)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Threads and bytes per read and write."""

    threads: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.threads} x {self.chunk // MIB} MiB"


SETTINGS = tuple(Setting(threads=t, chunk=c) for t in THREADS for c in CHUNKS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One read and the places where its bytes are written."""

    source: int
    offset: int
    length: int
    targets: tuple[int, ...]


def padded(length: int) -> int:
    """Round up to the alignment of direct writes."""
    return -(-length // PAGE) * PAGE


def reads(sizes: Sequence[int], chunk: int) -> list[tuple[int, int, int]]:
    """Cut files into (file, offset, length)."""
    return [
        (number, offset, min(chunk, size - offset))
        for number, size in enumerate(sizes)
        for offset in range(0, size, chunk)
    ]


def pieces(sizes: Sequence[int], total: int, chunk: int) -> list[Piece]:
    """Return the pieces that write at least `total` bytes, each input byte read once.

    Copies beyond the first go to regions behind it, like the repeats of a stack of layers.
    """
    cuts = reads(sizes, chunk)
    targets: list[list[int]] = [[] for _ in cuts]
    position = 0
    for number in itertools.cycle(range(len(cuts))):
        if position >= total:
            break
        targets[number].append(position)
        position += padded(cuts[number][2])
    return [
        Piece(source=source, offset=offset, length=length, targets=tuple(where))
        for (source, offset, length), where in zip(cuts, targets, strict=True)
    ]


def open_output(path: Path) -> tuple[int, bool]:
    """Open for direct writes, buffered where the file system refuses them."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666), hasattr(os, "O_DIRECT")
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        path.unlink(missing_ok=True)
        return os.open(path, flags, 0o666), False


def read_full(fd: int, view: memoryview, offset: int) -> None:
    """Fill the view from the file."""
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            raise OSError(errno.EIO, "input ended early")
        done += count


def write_full(fd: int, view: memoryview, offset: int) -> None:
    """Write the whole view to the file."""
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def work(queue: Iterator[Piece], inputs: Sequence[int], output: int, chunk: int) -> None:
    """Move pieces until none is left; one reused buffer."""
    buffer = memoryview(mmap.mmap(-1, padded(chunk)))
    for piece in queue:
        read_full(inputs[piece.source], buffer[: piece.length], piece.offset)
        for target in piece.targets:
            write_full(output, buffer[: padded(piece.length)], target)


class Shared:
    """An iterator that threads may share."""

    def __init__(self, items: Sequence[Piece]) -> None:
        self.items, self.lock = iter(items), threading.Lock()

    def __iter__(self) -> "Shared":
        return self

    def __next__(self) -> Piece:
        with self.lock:
            return next(self.items)


def move(todo: Sequence[Piece], inputs: Sequence[int], output: int, setting: Setting) -> None:
    """Run the threads over all pieces."""
    queue = Shared(todo)
    with ThreadPoolExecutor(setting.threads) as pool:
        crew = [
            pool.submit(work, queue, inputs, output, setting.chunk) for _ in range(setting.threads)
        ]
    for thread in crew:
        thread.result()


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """Result of the bare loop."""

    seconds: float
    direct: bool
    written: int


def loop(sources: Sequence[Path], out: Path, total: int, setting: Setting) -> Loop:
    """Read the sources once and write `total` bytes to the new file `out`, durably."""
    start = time.perf_counter()
    inputs = [os.open(path, os.O_RDONLY) for path in sources]
    output, direct = open_output(out)
    try:
        for fd in inputs:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        todo = pieces([os.fstat(fd).st_size for fd in inputs], total, setting.chunk)
        size = sum(padded(p.length) * len(p.targets) for p in todo)
        os.posix_fallocate(output, 0, size)
        move(todo, inputs, output, setting)
        os.fdatasync(output)
    finally:
        for fd in (*inputs, output):
            os.close(fd)
    return Loop(seconds=time.perf_counter() - start, direct=direct, written=size)


def weights(model: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint directory."""
    return sorted(model.glob("*.safetensors"))


def main() -> None:
    """Run the loop once and print its result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="checkpoint directory to read")
    parser.add_argument("out", type=Path, help="new file to write")
    parser.add_argument("--also", type=Path, nargs="*", default=[], help="more to read")
    parser.add_argument("--bytes", type=int, required=True, help="bytes to write")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=8, help="MiB")
    args = parser.parse_args()
    setting = Setting(threads=args.threads, chunk=args.chunk * MIB)
    sources = [path for model in (args.model, *args.also) for path in weights(model)]
    print(json.dumps(asdict(loop(sources, args.out, args.bytes, setting))))


if __name__ == "__main__":
    main()
