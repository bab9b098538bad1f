"""Fields of JSON that somebody else wrote: of the kind that is expected, or refused by name."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError

ABSOLUTE = re.compile(r"^(/|~|[A-Za-z]:[\\/]|\\\\)")


@dataclass(frozen=True, slots=True)
class Fields:
    """A JSON object, and where it lies.

    `null` and a key that is missing are the same: a figure that does not exist.

    Attributes:
        values: the object.
        file: where it was read.
        place: its place in there, such as `models[2].overall`.
    """

    values: Mapping[str, Any]
    file: Path
    place: str = ""

    def number(self, key: str) -> float | None:
        """Return a finite number; None where there is none, or it is not finite.

        Raises:
            CheckpointError: something else stands there; likewise below.
        """
        found = self.values.get(key)
        if found is None:
            return None
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise self._wrong(key, "number")
        return finite(found)

    def text(self, key: str) -> str | None:
        """Return a string, or None."""
        found = self.values.get(key)
        if found is not None and not isinstance(found, str):
            raise self._wrong(key, "string")
        return found

    def flag(self, key: str) -> bool:
        """Return whether something is true; what is missing is not."""
        found = self.values.get(key)
        if found is not None and not isinstance(found, bool):
            raise self._wrong(key, "truth value")
        return bool(found)

    def plain(self, key: str) -> list[Any]:
        """Return a list as it is; an empty one where there is none."""
        found = self.values.get(key)
        if found is not None and not isinstance(found, list):
            raise self._wrong(key, "list")
        return found or []

    def one(self, key: str) -> "Fields | None":
        """Return an object, or None."""
        found = self.values.get(key)
        if found is None:
            return None
        if not isinstance(found, dict):
            raise self._wrong(key, "object")
        return Fields(found, self.file, self._at(key))

    def some(self, key: str) -> "Fields":
        """Return an object, an empty one where there is none."""
        return self.one(key) or Fields({}, self.file, self._at(key))

    def each(self, key: str) -> "Iterator[Fields]":
        """Yield the objects of a list."""
        for i, found in enumerate(self.plain(key)):
            if not isinstance(found, dict):
                raise self._wrong(f"{key}[{i}]", "object")
            yield Fields(found, self.file, self._at(f"{key}[{i}]"))

    def grid(self, key: str) -> list[list[float | None]]:
        """Return a matrix of numbers whose rows are equally long."""
        rows = self.plain(key)
        if not all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows):
            raise self._wrong(key, "matrix")
        values = [value for row in rows for value in row if value is not None]
        if any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
            raise self._wrong(key, "matrix of numbers")
        return [[None if value is None else finite(value) for value in row] for row in rows]

    def _at(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key

    def _wrong(self, key: str, kind: str) -> CheckpointError:
        return CheckpointError(self.file, f"{self._at(key)} is no {kind}", "make the file again")


def finite(value: float) -> float | None:
    """Return a number as a float, None where it is not finite or beyond any float."""
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def named(text: str) -> str:
    """Return what a page may tell of a name: of a path on a machine its last part alone."""
    if not ABSOLUTE.match(text):
        return text
    parts = [part for part in re.split(r"[\\/]", text) if part]
    return parts[-1] if parts else text
