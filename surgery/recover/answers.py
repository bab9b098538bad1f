"""A teacher's answers on disk: its likeliest tokens at every scored token of some rows.

A .safetensors file of four tensors: `starts` [rows + 1], where each stored row's answers begin;
`ids` [n, k] and `logits` [n, k], log-probabilities in float16, the likeliest first; and `tail` [n],
the logarithm of the mass of all other tokens. Rounding is undone in part by the reader: the
softmax of logits and tail sums to one.

Axis letters: n scored tokens of all rows, k kept of each.
"""

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.disk import cannot_write, io_errors
from surgery.errors import CheckpointError, PlanError
from surgery.plan import TensorSpec
from surgery.shards import make_header

if TYPE_CHECKING:
    import numpy.typing as npt

    Ints = npt.NDArray[np.int64]

KIND = "teacher answers"
SHORT = 1 << 16  # vocabularies up to here have ids of two bytes
DTYPES = {"U16": "<u2", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How many answers of how many tokens each.

    Attributes:
        counts: scored tokens of each stored row.
        top_k: tokens kept.
        vocabulary: tokens there are.
    """

    counts: "Ints"
    top_k: int
    vocabulary: int

    @property
    def starts(self) -> "Ints":
        """Where each row's answers begin, and the end."""
        return np.concatenate(([0], np.cumsum(self.counts))).astype(np.int64)

    @property
    def tokens(self) -> int:
        """Answers in all."""
        return int(self.counts.sum())

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one answer."""
        ids = 2 if self.vocabulary <= SHORT else 4
        return self.top_k * (ids + 2) + 4

    def specs(self) -> dict[str, TensorSpec]:
        """Return the tensors of the file."""
        many = (self.tokens, self.top_k)
        return {
            "starts": TensorSpec("I64", (len(self.counts) + 1,)),
            "tail": TensorSpec("F32", (self.tokens,)),
            "ids": TensorSpec("U16" if self.vocabulary <= SHORT else "I32", many),
            "logits": TensorSpec("F16", many),
        }


class AnswersWriter:
    """Lays out the file first, fills it row by row, and puts it in place when all is there.

    Use as a context manager; a run that fails leaves nothing.
    """

    def __init__(self, out: Path, size: Size, metadata: Mapping[str, str]) -> None:
        self.out, self.specs = out, size.specs()
        self.header, self.offsets = make_header(self.specs, {**metadata, "surgery": KIND})
        self.part = out.with_name(f".{out.name}.{os.getpid()}.part")
        self.starts, self.done = size.starts, 0
        self.size = len(self.header) + sum(spec.nbytes for spec in self.specs.values())

    def check_room(self) -> None:
        """Refuse a disk that is too small, before the work.

        Raises:
            PlanError: it is, or the folder is not there.
        """
        try:
            free = shutil.disk_usage(self.out.parent).free
        except OSError as error:
            raise cannot_write(self.out, error) from error
        if free < self.size:
            fact = f"needs {self.size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free"
            raise PlanError(self.out, fact, "lower --top-k, or give less data")

    def __enter__(self) -> "AnswersWriter":
        try:
            self.file = self.part.open("wb")
        except OSError as error:
            raise cannot_write(self.out, error) from error
        with io_errors(self.out):
            self.file.write(self.header)
            self._put("starts", self.starts, 0)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            with io_errors(self.out):
                self.file.flush()
                os.fsync(self.file.fileno())
                self.file.close()
                self.part.replace(self.out)
            return
        with suppress(OSError):
            self.file.close()
            self.part.unlink()

    def add(self, **arrays: "npt.NDArray[Any]") -> None:
        """Write the next answers: ids [m, k], logits [m, k], tail [m]."""
        with io_errors(self.out):
            for name, array in arrays.items():
                self._put(name, array, self.done)
        self.done += len(arrays["tail"])

    def _put(self, name: str, array: "npt.NDArray[Any]", at: int) -> None:
        spec = self.specs[name]
        flat = np.ascontiguousarray(array, dtype=DTYPES[spec.dtype])
        each = flat.itemsize * int(np.prod(spec.shape[1:]))
        self.file.seek(self.offsets[name] + at * each)
        self.file.write(flat.data)


@dataclass(frozen=True, slots=True)
class Answers:
    """An opened file; its arrays stay on disk until they are asked for."""

    path: Path
    metadata: Mapping[str, str]
    arrays: Mapping[str, "npt.NDArray[Any]"]

    def of(self, place: int) -> tuple["npt.NDArray[Any]", ...]:
        """Return ids, logits and tail of a stored row."""
        starts = self.arrays["starts"]
        part = slice(int(starts[place]), int(starts[place + 1]))
        return tuple(np.array(self.arrays[name][part]) for name in ("ids", "logits", "tail"))


def open_answers(path: Path) -> Answers:
    """Open a file of answers.

    Raises:
        CheckpointError: it is no such file, or not whole.
    """
    found = open_checkpoint(path)
    if not isinstance(found, Checkpoint) or found.metadata.get("surgery") != KIND:
        fact = "is no file of a teacher's answers"
        raise CheckpointError(path, fact, "make one with `surgery teacher cache`")
    arrays = {}
    for name in ("starts", "tail", "ids", "logits"):
        tensor = found.tensors.get(name)
        if tensor is None or tensor.dtype not in DTYPES:
            raise CheckpointError(path, f"has no {name!r} that can be read", "make it again")
        arrays[name] = np.memmap(
            tensor.file, DTYPES[tensor.dtype], "r", offset=tensor.offset, shape=tensor.shape
        )
    return Answers(path, found.metadata, arrays)
