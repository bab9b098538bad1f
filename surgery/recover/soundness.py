"""Whether a checkpoint is as it was written; one that is not is set aside, never removed."""

import os
from collections.abc import Mapping
from errno import EIO, EISDIR, ENOENT, ENOTDIR
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError
from surgery.recover.manifest import (
    NewerFormatError,
    check_files,
    check_settings,
    check_step,
    read_manifest,
)

DAMAGE = {EIO, EISDIR, ENOENT, ENOTDIR}  # what else the system refuses says nothing of the files


def find_damage(place: Path, step: int, settings: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a checkpoint, or None; every byte of it is read.

    Raises:
        RecipeError: it is of a run that was asked something else.
        CheckpointError: it may not be read, or is of a later format: it may be sound.
    """
    try:
        manifest = read_manifest(place)
        check_step(place, manifest, step)
        check_settings(place, manifest, settings)
        check_files(place, manifest)
    except NewerFormatError:
        raise
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        file, fact = error.filename or place, f"cannot be read ({error.strerror})"
        if error.errno not in DAMAGE:
            raise CheckpointError(file, fact) from error
        return f"{file}: {fact}"
    return None


def set_aside(place: Path, reason: str) -> str:
    """Rename a damaged checkpoint; return the sentence that tells so."""
    bad = place.with_suffix(".bad")
    number = 1
    while os.path.lexists(bad):
        number += 1
        bad = place.with_suffix(f".bad{number}")
    try:
        place.rename(bad)
    except OSError as error:
        return f"{reason}; it is passed over, and keeps its name ({error.strerror})"
    return f"{reason}; it is passed over, and now named {bad.name}"
