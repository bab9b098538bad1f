"""The file that statistics are kept in: written whole or not at all, and tied to its model."""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import Checkpoint, TensorInfo, open_checkpoint, stored_tensors
from surgery.disk import io_errors
from surgery.errors import CheckpointError, RecipeError, TrainError
from surgery.plan import TensorSpec
from surgery.shards import make_header

if TYPE_CHECKING:
    import numpy as np
    import torch

    Floats = np.ndarray[Any, np.dtype[np.float64]]

LOOKED_AT = 4096  # bytes of each tensor that tell one model from another
NUMPY = {"F32": "<f4", "F64": "<f8"}


@dataclass(frozen=True, slots=True)
class Statistics:
    """An opened file of statistics that belongs to a model.

    Attributes:
        checkpoint: the file, to be a source of a plan.
        aliases: by linear map, the one under whose name its Gram matrix is kept.
        tokens: how many were seen.
    """

    checkpoint: Checkpoint
    aliases: Mapping[str, str]
    tokens: int

    def gram(self, module: str) -> TensorInfo:
        """Return the Gram matrix of a linear map's inputs.

        Raises:
            CheckpointError: there is none.
        """
        return self.tensor(f"{self.aliases.get(module, module)}.gram", "grams")

    def tensor(self, name: str, kind: str) -> TensorInfo:
        """Return a tensor of the file.

        Raises:
            CheckpointError: there is none of that name.
        """
        found = self.checkpoint.tensors.get(name)
        if found is None:
            fact = f"has no {name!r}"
            remedy = f"measure it with `surgery calibrate --collect {kind}`"
            raise CheckpointError(self.checkpoint.ref, fact, remedy)
        return found


def open_statistics(statistics: Checkpoint | str | Path, base: Checkpoint) -> Statistics:
    """Open a file of statistics, and make sure that they are of this model.

    Raises:
        CheckpointError: it is no such file.
        RecipeError: it was measured on other weights.
    """
    given = isinstance(statistics, Checkpoint)
    found = statistics if given else open_checkpoint(statistics)  # type: ignore[arg-type]
    assert isinstance(found, Checkpoint)  # noqa: S101 - either way
    if found.metadata.get("surgery") != "statistics":
        fact = "is no file of statistics"
        raise CheckpointError(found.ref, fact, "make one with `surgery calibrate`")
    if found.metadata.get("model") != identify(base):
        fact = f"was measured on another model than {base.ref}"
        raise RecipeError(found.ref, fact, "measure this one with `surgery calibrate`")
    aliases = json.loads(found.metadata.get("aliases", "{}"))
    return Statistics(found, aliases, int(found.metadata.get("tokens", "0")))


def identify(base: Checkpoint) -> str:
    """Return a digest of a model's tensors: names, dtypes, shapes and first bytes."""
    total = hashlib.sha256()
    for name in sorted(base.tensors):
        tensor = base.tensors[name]
        total.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        for part in stored_tensors(tensor):
            total.update(_read(part, min(part.nbytes, LOOKED_AT)))
    return total.hexdigest()


def read_numbers(tensor: TensorInfo) -> "Floats":
    """Read a small stored F32 or F64 tensor whole, as float64; no torch.

    Raises:
        CheckpointError: it is of another dtype, or not finite.
    """
    import numpy as np

    if tensor.dtype not in NUMPY:
        fact = f"holds {tensor.name} as {tensor.dtype}, where numbers are F32 or F64"
        raise CheckpointError(tensor.file, fact)
    flat = np.frombuffer(_read(tensor, tensor.nbytes), dtype=NUMPY[tensor.dtype])
    found = flat.astype(np.float64).reshape(tensor.shape)
    if not np.isfinite(found).all():
        raise CheckpointError(tensor.file, f"holds {tensor.name} with numbers that are not finite")
    return found


def _read(tensor: TensorInfo, size: int) -> bytes:
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        return file.read(size)


class StatisticsFile:
    """A .safetensors file that is laid out first, filled tensor by tensor, and then put in place.

    Use as a context manager; a run that fails leaves nothing.
    """

    def __init__(
        self, out: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]
    ) -> None:
        self.out, self.specs = out, specs
        self.header, self.offsets = make_header(specs, metadata)
        self.part = out.with_name(f".{out.name}.{os.getpid()}.part")

    def __enter__(self) -> "StatisticsFile":
        with io_errors(self.out):
            self.file = self.part.open("wb")
            self.file.write(self.header)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                with io_errors(self.out):
                    self.file.flush()
                    os.fsync(self.file.fileno())
                    self.part.replace(self.out)
        finally:
            with suppress(OSError):  # what was not flushed fails again
                self.file.close()
            self.part.unlink(missing_ok=True)

    def write(self, tensors: "Mapping[str, torch.Tensor]") -> None:
        """Write tensors to their places.

        Raises:
            TrainError: one is not finite.
        """
        import torch

        dtypes = {"F32": torch.float32, "F64": torch.float64}
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                fact = f"gives statistics that are not finite ({name})"
                raise TrainError("the model", fact, "its weights or the text are damaged")
            flat = tensor.contiguous().to(dtypes[self.specs[name].dtype])
            with io_errors(self.out):
                self.file.seek(self.offsets[name])
                self.file.write(flat.numpy().data)
