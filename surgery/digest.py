"""Digests of tensors that threads can compute piece by piece.

The digest of a tensor is the SHA-256 of the SHA-256 digests of its 512 KiB leaves, in order, so
that leaves may be hashed in any order by any thread. An empty tensor has no leaves.
Of inputs that are computed with, the leaves have checksums instead.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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
    """Digests by tensor name: outputs, and inputs as `file name:tensor name`.

    Attributes:
        told: by a step's first output the figures that it told.
    """

    outputs: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    told: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, line: Mapping[str, Any]) -> None:
        """Take the digests of a finished step."""
        self.outputs.update(line["outputs"])
        self.inputs.update(line["inputs"])
        self.told.update(line.get("told", {}))


class Leaves:
    """Hashes consecutive bytes of a tensor, from a leaf boundary on, given in any pieces."""

    def __init__(self, hashed: Callable[[memoryview], list[bytes]]) -> None:
        """Take the function that hashes the leaves of aligned pieces."""
        self.found: list[bytes] = []
        self._hashed = hashed
        self._rest = b""

    def feed(self, view: memoryview) -> None:
        """Take the next bytes."""
        if self._rest:
            missing = LEAF - len(self._rest)
            self._rest += view[:missing]
            view = view[missing:]
            if len(self._rest) < LEAF:
                return
            self.end()
        whole = len(view) // LEAF * LEAF
        self.found += self._hashed(view[:whole])
        self._rest = bytes(view[whole:])

    def end(self) -> list[bytes]:
        """Return the digests, that of an unfinished leaf included."""
        if self._rest:
            self.found += self._hashed(memoryview(self._rest))
            self._rest = b""
        return self.found


def checksums(view: memoryview) -> list[bytes]:
    """Return a 64-bit checksum of every leaf of a piece that starts on a leaf boundary.

    Multilinear hashing: the sum of odd random keys times the words, modulo 2^64, each word
    first mixed with its upper half, so that changes of sign bits alone do not cancel. Seven
    times as fast as SHA-256; it tells that bytes changed, not that nobody forged them.

    Source: Lemire and Kaser, "Strongly universal string hashing is fast", 2014, section 3.
    """
    return [_checksum(view[at : at + LEAF]) for at in range(0, len(view), LEAF)]


def _checksum(leaf: memoryview) -> bytes:
    import numpy as np

    whole = len(leaf) // 8 * 8
    tail = int.from_bytes(leaf[whole:], "little") ^ len(leaf) << 32
    words = np.frombuffer(leaf[:whole], np.uint64)
    keys = _keys()
    mixed = words >> np.uint64(32)
    mixed ^= words
    mixed *= keys[: len(words)]
    total = int(mixed.sum(dtype=np.uint64)) + (tail | 1) * int(keys[-1])
    return (total % (1 << 64)).to_bytes(8, "little")


@cache
def _keys() -> "NDArray[np.uint64]":
    import numpy as np

    raw = np.random.SFC64(0x5EED).random_raw(LEAF // 8 + 1)
    return raw | np.uint64(1)
