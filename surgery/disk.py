"""What the disk is asked for, by `os` and by name, and what it says when it refuses."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from surgery.errors import PlanError, StepError
from surgery.shards import BLOCK

DIRECT = getattr(os, "O_DIRECT", 0)  # not on macOS: writes are buffered there


@contextlib.contextmanager
def io_errors(out: Path) -> Iterator[None]:
    """Turn what the operating system refuses into one sentence about the output.

    Raises:
        StepError: in place of any OSError.
    """
    try:
        yield
    except OSError as error:
        remedy = "what is finished is kept: run the command again to go on"
        if error.errno == errno.ENOSPC:
            remedy = "free some space, then run the command again to go on"
        raise StepError(out, f"writing failed ({error.strerror})", remedy) from error


def cannot_write(out: Path, error: OSError) -> PlanError:
    """Return the error for an output whose folder refuses."""
    if error.errno == errno.ENOENT:
        return PlanError(out, f"its folder {out.parent} does not exist", "create it first")
    fact = f"cannot be written ({error.strerror})"
    return PlanError(out, fact, f"choose an output outside {out.parent}, or make that writable")


def allocate(fd: int, size: int) -> None:
    """Reserve the blocks, so that a full disk shows before the work and not midway."""
    try:
        os.posix_fallocate(fd, 0, size)
    except AttributeError:  # macOS
        os.ftruncate(fd, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(fd, size)


def open_direct(path: Path) -> int | None:
    """Open a file for writing past the page cache; None where the file system does not."""
    try:
        return os.open(path, os.O_WRONLY | DIRECT | os.O_CLOEXEC) if DIRECT else None
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None


def write_all(fd: int, view: memoryview, offset: int) -> None:
    """Write all of `view`, however little the system takes at once."""
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def write_blocks(fd: int | None, view: memoryview, offset: int) -> int:
    """Write whole blocks past the page cache; return how many bytes were written."""
    done = 0
    while fd is not None and done < len(view) and done % BLOCK == 0:
        try:
            done += os.pwrite(fd, view[done:], offset + done)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            fd = None  # this file system takes the flag, but not the write
    return done
