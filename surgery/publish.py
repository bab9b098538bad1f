"""Move a finished directory into place, also where another one stands."""

import ctypes
import errno
import os
import stat
import sys
from pathlib import Path

RENAME_EXCHANGE = 2
AT_FDCWD = -100


def replace_directory(new: Path, out: Path, aside: Path) -> None:
    """Put `new` at `out`, and what stood there at `new` or `aside`, for the caller to remove.

    On Linux the two change places in one step. Elsewhere the old one is moved aside first, and
    `restore` puts it back should the program die in between.
    """
    try:
        exchange(new, out)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
            raise
        os.rename(out, aside)
        os.rename(new, out)


def exchange(a: Path, b: Path) -> None:
    """Let two paths change places atomically (renameat2, Linux 3.15 and glibc 2.28).

    Raises:
        OSError: ENOSYS where the system cannot.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None or sys.platform != "linux":
        raise OSError(errno.ENOSYS, "renameat2 is not available")
    if call(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def restore(out: Path, aside: Path) -> None:
    """Undo the first half of a replacement that was cut short."""
    if aside.exists() and not os.path.lexists(out):
        os.rename(aside, out)


def discard(path: Path) -> None:
    """Remove a file or a tree of ours; links are removed, never followed."""
    if not stat.S_ISDIR(path.lstat().st_mode):
        os.unlink(path)
        return
    for name in os.listdir(path):
        discard(path / name)
    os.rmdir(path)


def sync_directory(path: Path) -> None:
    """Put a directory's entries on disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
