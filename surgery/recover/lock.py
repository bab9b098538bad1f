"""The lock of a folder that one run at a time may change."""

import fcntl
import os
from pathlib import Path

from surgery.errors import PlanError


class FolderLock:
    """Held from `take` to `drop` or the end of the process, however it ends: none is ever stale."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._fd = -1

    def take(self) -> None:
        """Make the folder and lock it, unless that is done already.

        Raises:
            PlanError: a run that lives holds it, or it cannot be written.
        """
        if self._fd >= 0:
            return
        fd = -1
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise self._refusal(error) from error
        self._fd = fd

    def drop(self) -> None:
        """Let others have it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _refusal(self, error: OSError) -> PlanError:
        if isinstance(error, BlockingIOError):
            remedy = "wait for it, or choose another output"
            return PlanError(self.folder, "another run is working in it", remedy)
        return PlanError(self.folder, f"cannot be written ({error.strerror})")
