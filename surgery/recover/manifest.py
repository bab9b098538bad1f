"""What a checkpoint of a run says of itself, and whether its files are as it says."""

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from surgery.errors import CheckpointError, RecipeError
from surgery.provenance import tool_version

NAME = "MANIFEST.json"
FORMAT = 1
LONGEST = 60  # characters of an option's value in a message


class FileTold(NamedTuple):
    """Size and digest of a file."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The facts of a checkpoint.

    Attributes:
        tokens: trained on so far.
        score: what the best checkpoint is chosen by, lower is better; None where not measured.
        settings: what must not change over a run.
        versions: of the programs that wrote it; told, not checked.
        files: everything else in the folder.
    """

    step: int
    tokens: int
    score: float | None
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    files: Mapping[str, FileTold]

    def document(self) -> bytes:
        """Return the file's bytes, which hold their own digest."""
        files = {name: told._asdict() for name, told in self.files.items()}
        told = {"format": FORMAT, "settings_digest": digest(self.settings)}
        told |= {name: getattr(self, name) for name in self.__slots__} | {"files": files}
        return canonical({**told, "digest": digest(told)})


def canonical(document: object) -> bytes:
    """Return the one JSON text of a value; floats keep every bit."""
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def digest(document: object) -> str:
    """Return the SHA-256 of a value's JSON text."""
    return hashlib.sha256(canonical(document)).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest; any changed byte of it is noticed.

    Raises:
        CheckpointError: it is damaged, or of a later format.
        OSError: it is missing or cannot be read.
    """
    raw = (folder / NAME).read_bytes()
    try:
        told = json.loads(raw)
        own = told.pop("digest")
        sound = raw == canonical({**told, "digest": own}) and own == digest(told)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise CheckpointError(folder / NAME, "is damaged")
    if told.pop("format") != FORMAT:
        raise NewerFormatError(folder / NAME, "is of a format that is not known", "update surgery")
    told.pop("settings_digest")
    files = {name: FileTold(**file) for name, file in told.pop("files").items()}
    return Manifest(files=files, **told)


class NewerFormatError(CheckpointError):
    """The checkpoint may be sound; another version reads it."""


def check_files(folder: Path, manifest: Manifest) -> None:
    """Read every file of a checkpoint and compare it with the manifest.

    Raises:
        CheckpointError: one is missing or differs.
        OSError: one cannot be read.
    """
    for name, told in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(path, "is missing")
        size = path.stat().st_size
        if size != told.size:
            raise CheckpointError(path, f"has {size} bytes where {told.size} were written")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != told.sha256:
            raise CheckpointError(path, "does not hold what was written")


def check_step(folder: Path, manifest: Manifest, step: int) -> None:
    """Refuse a checkpoint under another one's name.

    Raises:
        CheckpointError: it is.
    """
    if manifest.step != step:
        raise CheckpointError(folder, f"holds step {manifest.step}")


def check_settings(folder: Path, manifest: Manifest, settings: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of a run that was asked something else.

    Raises:
        RecipeError: it was; the first option that differs is named.
    """
    check_same(folder.parent, settings, manifest.settings)


def check_same(place: Path, asked: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Refuse to go on with what was begun otherwise.

    Raises:
        RecipeError: it was; the first option that differs is named.
    """
    given = json.loads(canonical(asked))
    for name in sorted({*given, *before}):
        now, then = given.get(name), before.get(name)
        if now != then:
            option = f"--{name.replace('_', '-')} {_told(now)}"
            fact = f"the run in {place} was started with {_told(then)}"
            raise RecipeError(option, fact, "give the same again, or choose another output")


def versions() -> dict[str, str]:
    """Return the versions of the programs that write a checkpoint."""
    import torch

    return {
        "surgery": tool_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _told(value: object) -> str:
    if value is None:
        return "(not given)"
    text = value if isinstance(value, str) else canonical(value).decode()
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
