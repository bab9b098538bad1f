"""A result as one JSON file: its place checked before the work, written whole or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.errors import PlanError


def check_file(output: Path | None, *, force: bool) -> None:
    """Refuse a place that no file can be written to.

    Raises:
        PlanError: it is a folder, is in none, or holds a file that may not be replaced.
    """
    if output is None:
        return
    if output.is_dir() or not output.parent.is_dir():
        raise PlanError(
            output, "is not a place for a file", "name a file in a folder that is there"
        )
    if output.exists() and not force:
        raise PlanError(output, "already exists", "name another file, or add --force")


def save_json(document: Mapping[str, Any], output: Path) -> None:
    """Write the whole file beside its place, and move it there.

    Raises:
        PlanError: it cannot be written.
    """
    part = output.with_name(f".{output.name}.part")
    try:
        part.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", "utf-8")
        part.replace(output)
    except OSError as error:
        part.unlink(missing_ok=True)
        reason = (error.strerror or "cannot be written").lower()
        raise PlanError(output, reason, "save it elsewhere") from error
