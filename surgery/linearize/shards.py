"""Hidden states of rows on disk, in files of many rows, each there whole or not at all.

Axis letters: t tokens of a row, d width.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.disk import io_errors
from surgery.publish import sync_directory
from surgery.recover.tensor_file import specs_of, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

SHARD = 1 << 30  # bytes of a file; one row at least


class Shards:
    """What goes into a layer for every row, by the row's name.

    Attributes:
        folder: where the files lie.
        parts: names of the rows of each file.
    """

    def __init__(self, folder: Path, names: Sequence[str], *, row_bytes: int) -> None:
        """Lay out rows; nothing is written.

        Args:
            row_bytes: of the states of a row.
        """
        self.folder = folder
        size = max(SHARD // row_bytes, 1)
        self.parts = [tuple(names[at : at + size]) for at in range(0, len(names), size)]
        self._of = {name: number for number, part in enumerate(self.parts) for name in part}
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.parts)

    def path(self, number: int) -> Path:
        """Return where a file lies."""
        return self.folder / f"states-{number:05d}.safetensors"

    def has(self, number: int) -> bool:
        """Whether a file was written."""
        return self.path(number).is_file()

    def read(self, name: str) -> "Tensor":
        """Return the states of a row, [t, d]."""
        from safetensors import safe_open

        number = self._of[name]
        if number not in self._open:
            self._open[number] = safe_open(self.path(number), framework="pt")
        found: Tensor = self._open[number].get_tensor(name)
        return found

    def write(self, number: int, rows: "Iterable[tuple[str, Tensor]]", like: "Tensor") -> None:
        """Write a file, row by row.

        Args:
            rows: names and states, all of that file.
            like: states of any row, for dtype and shape; may be on meta.

        Raises:
            StepError: the disk refuses.
        """
        specs = specs_of(dict.fromkeys(self.parts[number], like))
        with io_errors(self.path(number)):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_tensors(self.path(number), specs, rows)
            sync_directory(self.folder)

    def drop(self, number: int) -> None:
        """Remove a file that is no longer read.

        Raises:
            StepError: the disk refuses.
        """
        self._open.clear()
        with io_errors(self.folder):
            self.path(number).unlink(missing_ok=True)

    def nbytes(self) -> int:
        """Return the bytes of the files that there are."""
        found = (self.path(n) for n in range(len(self)))
        return sum(path.stat().st_size for path in found if path.is_file())
