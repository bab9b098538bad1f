"""What a pipeline remembers between runs, in one file.

It saves reading: digests of files that have not changed since they were read. Whether a
checkpoint is up to date is decided by its own record; without this file, everything is read
again, results are measured again, and no output that is out of date is replaced unasked.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.checkpoint import Stamp, stamp
from surgery.errors import StepError

FORMAT = 1
Digests = dict[str, dict[str, str]]  # kind of digest: tensor name: digest


@dataclass(slots=True)
class State:
    """The remembered facts.

    Attributes:
        files: per file its stamp and the digests of its tensors.
        own: steps whose outputs this pipeline made, and may replace.
        removed: per step the digests of an output that was removed after use, by file name.
        results: per measurement what it was asked and the digest of its JSON file.
    """

    path: Path
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    own: list[str] = field(default_factory=list)
    removed: dict[str, dict[str, Digests]] = field(default_factory=dict)
    results: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> "State":
        """Read the file; one that is missing, broken or of another format counts as empty."""
        try:
            found = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return cls(path)
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            return cls(path)
        try:
            return cls(path, **found)
        except TypeError:
            return cls(path)

    def save(self) -> None:
        """Replace the file in one step.

        Raises:
            StepError: the disk refuses.
        """
        told = {"format": FORMAT, "files": self.files, "own": self.own}
        told |= {"removed": self.removed, "results": self.results}
        write_file(self.path, json.dumps(told).encode())

    def digests(self, file: Path, mark: Stamp) -> Digests:
        """Return what is known of a file as it is now, to be added to."""
        key, told = str(file.absolute()), list(mark[1:])  # a device's number changes on mounting
        entry = self.files.get(key)
        if entry is None or entry["stamp"] != told:
            entry = self.files[key] = {"stamp": told, "digests": {}}
        digests: Digests = entry["digests"]
        return digests

    def note_output(self, file: Path, found: dict[str, str]) -> None:
        """Note the SHA-256 digests of a file just written.

        What else was known of tensors that came out as before stays known.
        """
        before: Digests = self.files.get(str(file.absolute()), {}).get("digests", {})
        same = {n for n, d in before.get("sha256", {}).items() if found.get(n) == d}
        now = self.digests(file, stamp(file))
        now["sha256"] = found
        now["sum"] = {n: d for n, d in before.get("sum", {}).items() if n in same}


def write_file(path: Path, data: bytes) -> None:
    """Replace a small file in one step, its bytes on disk.

    Raises:
        StepError: the disk refuses.
    """
    new = path.with_name(f".{path.name}.new")
    try:
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        raise StepError(path, f"writing failed ({error.strerror})", "free some space") from error
