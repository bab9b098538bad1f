"""A finished output as it lies on disk, and whether it still is what its record says."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint import Checkpoint, Header, read_header
from surgery.checkpoint.jsonfile import read_small_file
from surgery.errors import CheckpointError
from surgery.pipeline.inputs import read
from surgery.pipeline.state import State
from surgery.provenance import KEY, RECORD, is_sealed
from surgery.slices import Sources

UNREAD = ("README.md",)  # for people; names of inputs stand in it


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A checkpoint that surgery wrote.

    Attributes:
        record: as it was written, seal included.
        text: of the record.
        headers: of its weight files.
    """

    path: Path
    record: Mapping[str, Any]
    text: str
    headers: Mapping[Path, Header]

    @property
    def bare(self) -> bool:
        """Whether it is one file."""
        return self.path.is_file()

    @property
    def contents(self) -> str:
        """Digest of all that a reader of the output can see, but not of how it was made."""
        files = {n: d for n, d in self.record["files"].items() if n not in UNREAD}
        told = [self.record["outputs"], self.record["headers"], files]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def find_output(path: Path) -> Output | None:
    """Return what surgery wrote at a path; None where nothing is, or something else.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        if path.is_file():
            header = read_header(path)
            text, headers = header.metadata.get(KEY, ""), {path: header}
        elif (path / RECORD).is_file():
            text, headers = read_small_file(path / RECORD).decode(), {}
        else:
            return None
        record = json.loads(text)
        if not headers:
            headers = {path / name: read_header(path / name) for name in record["headers"]}
    except (ValueError, KeyError, TypeError):
        return None
    wanted = {"outputs", "headers", "files", "inputs", "operation", "parameters", "versions"}
    if not isinstance(record, dict) or not wanted <= set(record):
        return None
    return Output(path=path, record=record, text=text, headers=headers)


def what_changed(output: Output, state: State) -> str:
    """Return what of an output is not as its record says, or nothing.

    Files that have not changed since they were last read are not read again.
    """
    if not is_sealed(output.text.rstrip("\n")):
        return RECORD
    for name, digest in output.record["files"].items():
        if name not in UNREAD and _file_digest(output.path / name) != digest:
            return str(name)
    found: dict[str, str] = {}
    for file, header in output.headers.items():
        known = state.digests(file, header.stamp).setdefault("sha256", {})
        missing = [(t, "sha256") for t in header.tensors if t.name not in known]
        if missing:
            known.update(_read(file, header, missing))
        found |= {t.name: known[t.name] for t in header.tensors}
    told = output.record["outputs"]
    return next((n for n in {**told, **found} if told.get(n) != found.get(n)), "")


def _file_digest(path: Path) -> str:
    try:
        return hashlib.sha256(read_small_file(path)).hexdigest()
    except CheckpointError:
        return ""


def _read(file: Path, header: Header, missing: list[Any]) -> dict[str, str]:
    tensors = {t.name: t for t in header.tensors}
    source = Checkpoint(
        ref=str(file), root=file.parent, tensors=tensors, files=(file,), stamps={file: header.stamp}
    )
    with Sources([source]) as sources:
        digests = read(sources, missing)
        sources.check_unchanged()
    return {t.name: digest for (t, _), digest in zip(missing, digests, strict=True)}
