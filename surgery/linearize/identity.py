"""What tells whether a stage was done for the same ask."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.disk import io_errors
from surgery.provenance import read_record
from surgery.recover.sources import Source

BLOCK = 1 << 20  # bytes of a file digested at once


def digest_of(told: object) -> str:
    """Return the SHA-256 of what JSON holds."""
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def identity_of(base: Checkpoint) -> list[Any]:
    """Return what a model is known by without its weights being read."""
    files = [(name, *base.stamps[file][2:]) for file, name in base.file_names.items()]
    return [str(base.ref), base.config, sorted(files)]


def file_digest(source: Source) -> str:
    """Return the digest of a file; a data set of the hub goes by its name."""
    if source.found_kind == "hub":
        return str(source.path)
    found = hashlib.sha256()
    with io_errors(Path(source.path)), Path(source.path).open("rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def recorded_digests(model: Path) -> Mapping[str, Any]:
    """Return the digests of a model's tensors, by its record."""
    found: Mapping[str, Any] = (read_record(open_checkpoint(model)) or {})["outputs"]
    return found
