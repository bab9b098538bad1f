"""Digests of tensors that threads can compute piece by piece.

The digest of a tensor is the SHA-256 of the SHA-256 digests of its 512 KiB leaves, in order, so
that leaves may be hashed in any order by any thread. An empty tensor has no leaves.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

LEAF = 512 << 10
ALGORITHM = "sha256 of the sha256 of every 512 KiB leaf"
PLACEHOLDER = "0" * 64


def leaf_digests(view: memoryview) -> list[bytes]:
    """Hash a piece of a tensor that starts on a leaf boundary."""
    starts = range(0, len(view), LEAF)
    return [hashlib.sha256(view[at : at + LEAF]).digest() for at in starts]


def combine(leaves: Iterable[bytes]) -> str:
    """Return the tensor's digest in hexadecimal."""
    total = hashlib.sha256()
    for leaf in leaves:
        total.update(leaf)
    return total.hexdigest()


@dataclass(slots=True)
class Digests:
    """Digests by tensor name: outputs, and inputs as `file name:tensor name`."""

    outputs: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)

    def add(self, line: Mapping[str, Any]) -> None:
        """Take the digests of a finished step."""
        self.outputs.update(line["outputs"])
        self.inputs.update(line["inputs"])


class Leaves:
    """Hashes consecutive bytes of a tensor, from a leaf boundary on, given in any pieces."""

    def __init__(self) -> None:
        self.found: list[bytes] = []
        self._open = hashlib.sha256()
        self._filled = 0

    def feed(self, view: memoryview) -> None:
        """Take the next bytes."""
        while len(view):
            taken = view[: LEAF - self._filled]
            self._open.update(taken)
            self._filled += len(taken)
            view = view[len(taken) :]
            if self._filled == LEAF:
                self._close()

    def _close(self) -> None:
        self.found.append(self._open.digest())
        self._open, self._filled = hashlib.sha256(), 0

    def end(self) -> list[bytes]:
        """Return the digests, that of an unfinished leaf included."""
        if self._filled:
            self._close()
        return self.found
