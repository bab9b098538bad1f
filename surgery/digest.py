"""Digests of tensors that threads can compute piece by piece.

The digest of a tensor is the SHA-256 of the SHA-256 digests of its 512 KiB leaves, in order, so
that leaves may be hashed in any order by any thread. An empty tensor has no leaves.
"""

import hashlib
from collections.abc import Iterable

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
