"""A checkpoint of a run that was found sound, read tensor by tensor."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import TensorInfo, read_header
from surgery.errors import CheckpointError
from surgery.recover.distributed import World
from surgery.recover.sharded import CODES, DTYPES, agreed, fill

if TYPE_CHECKING:
    import torch

FACTS = "state.json"
Shapes = Mapping[str, Mapping[str, tuple[str, Sequence[int]]]]  # section: tensor: dtype and shape


class Saved(Mapping[str, Any]):
    """What was saved: `saved["progress"]` is a section of JSON; tensors are copied by `fill`.

    Every process has the facts and the tensors' shapes; the first one alone reads the files.

    Attributes:
        tensors: dtype (safetensors code) and shape by section and name.
    """

    def __init__(
        self, folder: Path, facts: Mapping[str, Any], shapes: Shapes, world: World
    ) -> None:
        self.folder, self.tensors, self.world = folder, shapes, world
        self._facts = facts
        self._headers: dict[str, dict[str, TensorInfo]] = {}

    def __getitem__(self, section: str) -> Any:  # noqa: ANN401 - what JSON has
        return self._facts[section]

    def __iter__(self) -> Iterator[str]:
        return iter(self._facts)

    def __len__(self) -> int:
        return len(self._facts)

    def fill(self, section: str, name: str, target: "torch.Tensor") -> None:
        """Copy a tensor into one of the same shape and dtype, sharded or not.

        Raises:
            CheckpointError: there is none, or it is of another shape or dtype.
        """
        place = f"{self.folder / section}.safetensors"
        dtype, shape = self.tensors.get(section, {}).get(name, ("", []))
        if not dtype:
            raise CheckpointError(place, f"has no {name!r}, which the run trains")
        if CODES[str(target.dtype)] != dtype or list(target.shape) != list(shape):
            fact = f"holds {name!r} as {dtype} {list(shape)}"
            wanted = f"the run needs {CODES[str(target.dtype)]} {list(target.shape)}"
            raise CheckpointError(place, f"{fact}, and {wanted}")
        fill(target, lambda: self.read(section, name), self.world)

    def read(self, section: str, name: str) -> "torch.Tensor":
        """Return a whole tensor.

        Raises:
            CheckpointError: the file is no longer there or cannot be read.
        """
        import torch

        file = self.folder / f"{section}.safetensors"
        found = self._header(section)[name]
        with _told_as_unreadable(file), file.open("rb") as stream:
            stream.seek(found.offset)
            raw = bytearray(stream.read(found.nbytes))
        if len(raw) != found.nbytes:
            raise CheckpointError(file, "became shorter after it was checked")
        dtype = getattr(torch, DTYPES[found.dtype])
        if not raw:
            return torch.empty(found.shape, dtype=dtype)
        return torch.frombuffer(raw, dtype=dtype).reshape(found.shape)

    def state(self) -> dict[str, Any]:
        """Return everything as it was given to `save`, tensors whole; for small states."""
        tables = {s: {n: self.read(s, n) for n in names} for s, names in self.tensors.items()}
        return {**self._facts, **tables}

    def _header(self, section: str) -> dict[str, TensorInfo]:
        if section not in self._headers:
            header = read_header(self.folder / f"{section}.safetensors")
            self._headers[section] = {tensor.name: tensor for tensor in header.tensors}
        return self._headers[section]


def open_saved(folder: Path, world: World) -> Saved:
    """Open a checkpoint; all processes call it.

    Raises:
        CheckpointError: a file of it cannot be read.
    """

    def act() -> list[Any]:
        with _told_as_unreadable(folder):
            facts = json.loads((folder / FACTS).read_bytes())
        headers = {path.stem: read_header(path) for path in sorted(folder.glob("*.safetensors"))}
        shapes = {
            section: {tensor.name: (tensor.dtype, list(tensor.shape)) for tensor in header.tensors}
            for section, header in headers.items()
        }
        return [facts, shapes]

    facts, shapes = agreed(world, act)
    return Saved(folder, facts, shapes, world)


@contextmanager
def _told_as_unreadable(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(place, f"cannot be read ({error.strerror})") from error
