"""An output that appears whole or not at all, and that a killed run can go on with.

Everything is written into `OUT.surgery-partial/`: shards at their full size with the headers in
place, and a journal with one line for each finished step. When all is on disk, one rename puts
the result at OUT. Every call that changes the disk goes through `os`, so that tests can make
each of them fail.
"""

import contextlib
import errno
import fcntl
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.disk import (
    allocate,
    cannot_write,
    io_errors,
    open_direct,
    write_all,
    write_blocks,
)
from surgery.errors import PlanError, StepError
from surgery.publish import discard, replace_directory, restore, sync_directory
from surgery.shards import BLOCK, Layout

SUFFIX = ".surgery-partial"


class Partial:
    """The unfinished output of one run; holds its lock and its open shards.

    Use as a context manager: leaving it closes files and drops the lock, and keeps what was
    written for a later resume unless it was published.
    """

    def __init__(self, out: Path, layout: Layout, *, bare: bool) -> None:
        self.out = out
        self.layout = layout
        self.bare = bare
        self.folder = partial_folder(out)
        self.new = self.folder / "out"
        self._files: list[int] = []
        self._direct: list[int | None] = []
        self._journal = -1
        self._lock = -1
        self._journal_lock = threading.Lock()
        self._kept = False
        self.published = False

    def __enter__(self) -> "Partial":
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.folder)
        except OSError as error:
            raise cannot_write(self.out, error) from error
        try:
            self._take_lock()
            restore(self.out, self.folder / "old")
            if os.path.lexists(self.folder / "old"):  # replaced, and died before clearing up
                discard(self.folder / "old")
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._kept:
            return
        if self._journal < 0 and not self.new.exists():
            self._drop()
        self._close()

    def leave_open(self) -> None:
        """Keep files and lock on leaving: a thread that hangs may still write."""
        self._kept = True

    def abandon(self) -> None:
        """Throw away what was made: the same ask would fail in the same way."""
        self._drop()

    def _close(self) -> None:
        self._close_shards()
        for fd in (self._journal, self._lock):
            if fd >= 0:
                os.close(fd)
        self._journal, self._lock = -1, -1

    def _close_shards(self) -> None:
        for fd in (*self._files, *self._direct):
            if fd is not None:
                os.close(fd)
        self._files, self._direct = [], []

    def _drop(self) -> None:
        """Remove the folder; what cannot be removed is swept by the next run."""
        with contextlib.suppress(OSError):
            discard(self.folder)

    def _take_lock(self) -> None:
        try:
            self._lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError as error:  # the run that held the folder has just finished
            raise PlanError(self.out, "another run has just written it") from error
        except BlockingIOError as error:
            fact = "another run is writing to it"
            raise PlanError(self.out, fact, "wait for it, or choose another output") from error
        except OSError as error:
            raise cannot_write(self.out, error) from error
        if not _is_same(self._lock, self.folder / "lock"):
            raise PlanError(self.out, "another run has just written it")

    def begin(self, fingerprint: str, *, fresh: bool) -> list[dict[str, Any]]:
        """Create the shards, or take up those of an interrupted run; return its finished steps.

        Args:
            fingerprint: identity of the plan; only a run with the same one is taken up.
            fresh: throw away what an earlier run left.

        Raises:
            PlanError: another command's unfinished output is in the way.
            StepError: the disk is full, or refuses.
        """
        lines = [] if fresh or not self._has_shards() else self._read_journal()
        if lines and lines[0].get("fingerprint") != fingerprint:
            fact = (
                f"{self.folder.name} holds the unfinished output of another command or other inputs"
            )
            raise PlanError(self.out, fact, "finish that one, or discard it with --fresh")
        if not lines or not self._shards_are_whole():
            self._create(fingerprint)
            return []
        with io_errors(self.out):
            self._sweep_beside()
            self._open_shards(create=False)
            self._open_journal()
        return lines[1:]

    def _create(self, fingerprint: str) -> None:
        try:
            with io_errors(self.out):
                self._sweep()
                os.mkdir(self.new)
                self._open_shards(create=True)
                self._open_journal()
                self._append({"fingerprint": fingerprint})
        except StepError:
            self._close_shards()
            self._drop()  # nothing is finished yet, and the space may be needed
            raise

    def _has_shards(self) -> bool:
        return self.new.is_dir() and any(p.suffix == ".safetensors" for p in self.new.iterdir())

    def _read_journal(self) -> list[dict[str, Any]]:
        try:
            raw = (self.folder / "journal").read_bytes()
        except OSError:
            return []
        lines = []
        for line in filter(None, raw.splitlines()):
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue  # the line that was being written when a run was killed
        return lines

    def _shards_are_whole(self) -> bool:
        def size(name: str) -> int:
            path = self.new / name
            return path.stat().st_size if path.is_file() else -1

        return all(size(shard.name) == shard.size for shard in self.layout.shards)

    def _sweep(self) -> None:
        for name in os.listdir(self.folder):
            if name not in ("lock", "old"):
                discard(self.folder / name)

    def _sweep_beside(self) -> None:
        """Remove what an earlier try put beside the shards; it may have changed since."""
        shards = {shard.name for shard in self.layout.shards}
        for name in os.listdir(self.new):
            if name not in shards:
                discard(self.new / name)

    def _open_shards(self, *, create: bool) -> None:
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        for shard in self.layout.shards:
            path = self.new / shard.name
            fd = os.open(path, flags, 0o666)
            self._files.append(fd)
            if create:
                allocate(fd, shard.size)
            self._direct.append(open_direct(path))
            write_all(fd, memoryview(shard.header), 0)

    def _open_journal(self) -> None:
        flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
        self._journal = os.open(self.folder / "journal", flags, 0o666)

    def _append(self, line: Mapping[str, Any]) -> None:
        """Write one line, behind a line break that ends a line cut short before it."""
        data = b"\n" + json.dumps(line, separators=(",", ":")).encode() + b"\n"
        with self._journal_lock:
            while data:
                data = data[os.write(self._journal, data) :]

    def write(self, name: str, at: int, view: memoryview) -> None:
        """Write a piece of tensor `name`, `at` bytes into it; any thread, any order.

        Whole blocks go directly to the disk where the file system allows it: `view` must then
        start on a block in memory. The rest takes the page cache.
        """
        place = self.layout.places[name]
        offset = place.offset + at
        whole = len(view) // BLOCK * BLOCK if offset % BLOCK == 0 else 0
        with io_errors(self.out):
            done = write_blocks(self._direct[place.shard], view[:whole], offset)
            write_all(self._files[place.shard], view[done:], offset + done)

    def read(self, name: str, at: int, view: memoryview) -> None:
        """Read back a piece of a written tensor, to check it on a resume."""
        place = self.layout.places[name]
        with io_errors(self.out):
            if os.preadv(self._files[place.shard], [view], place.offset + at) != len(view):
                raise OSError(errno.EIO, "short read of a shard")

    def finish(self, line: Mapping[str, Any]) -> None:
        """Note a finished step, so that a resume does not do it again."""
        with io_errors(self.out):
            self._append(line)

    def reheader(self, shard: int, header: bytes) -> None:
        """Replace a shard's header by one of the same length."""
        with io_errors(self.out):
            write_all(self._files[shard], memoryview(header), 0)

    def add(self, name: str, data: bytes) -> None:
        """Write a small file beside the shards and put it on disk."""
        path = self.new / name
        with io_errors(self.out):
            if not path.parent.is_dir():
                os.mkdir(path.parent)
            fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                write_all(fd, memoryview(data), 0)
                os.fsync(fd)
            finally:
                os.close(fd)

    def publish(self, *, replace: bool) -> None:
        """Put everything on disk, then move it to its place in one step.

        Raises:
            PlanError: something appeared at the output meanwhile and `replace` is False.
            StepError: the disk refuses.
        """
        with io_errors(self.out):
            for fd in self._files:
                os.fsync(fd)
            for folder in (*_folders(self.new), self.folder):
                sync_directory(folder)
            self._move(replace=replace)
            self.published = True
        with contextlib.suppress(OSError):  # it is there; whether after a power cut is the disk's
            sync_directory(self.out.parent)
        self._drop()

    def _move(self, *, replace: bool) -> None:
        source = self.new / self.layout.shards[0].name if self.bare else self.new
        occupied = is_occupied(self.out)
        if occupied and not replace:
            raise PlanError(self.out, "appeared while the run was working", "use --force")
        if occupied and not self.bare:
            replace_directory(source, self.out, self.folder / "old")
        else:
            os.replace(source, self.out)


def partial_folder(out: Path) -> Path:
    """Return where the unfinished form of an output is kept."""
    return out.parent / (out.name + SUFFIX)


def unfinished(out: Path) -> str | None:
    """Return the fingerprint of the run that left an unfinished output behind, or None."""
    try:
        with (partial_folder(out) / "journal").open("rb") as journal:
            first = next(line for line in journal if line.strip())
        return str(json.loads(first)["fingerprint"])
    except (OSError, StopIteration, ValueError, KeyError, TypeError):
        return None


def clear_leftovers(out: Path) -> None:
    """Remove what a run left beside its finished output, unless another run is at it."""
    folder = partial_folder(out)
    try:
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        discard(folder)
    except OSError:  # held, or the disk refuses; the next run will sweep it
        return
    finally:
        os.close(lock)


def is_occupied(out: Path) -> bool:
    """Whether something is at the output already; an empty directory does not count."""
    if out.is_symlink():
        return True
    try:
        return next(out.iterdir(), None) is not None
    except OSError:  # no directory; perhaps a file
        return os.path.lexists(out)


def _folders(top: Path) -> list[Path]:
    return [*(path for path in top.iterdir() if path.is_dir()), top]


def _is_same(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except OSError:
        return False
