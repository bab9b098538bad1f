"""Tensors that processes share, to one file and back, one tensor at a time.

A sharded tensor is gathered, written by the first process and forgotten before the next one, so
that no process ever holds more of the others' shards than one tensor. The file knows nothing of
processes: any number of them reads it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from surgery import errors
from surgery.compute import STORED
from surgery.disk import io_errors
from surgery.plan import TensorSpec
from surgery.recover.distributed import World
from surgery.recover.manifest import FileTold
from surgery.shards import make_header

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
DTYPES = {**STORED, "U16": "uint16", "U32": "uint32", "U64": "uint64"}
CODES = {f"torch.{name}": code for code, name in DTYPES.items()}


class HashedFile:
    """A new file that is hashed as it is written; what fails is told at the end.

    The other processes wait for the first one at every tensor, so it gathers on after a failure.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.size, self._hash = path, 0, hashlib.sha256()
        self._failure: OSError | None = None
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
        except OSError as error:
            self._failure = error

    def write(self, data: "memoryview | bytes") -> None:
        """Append bytes, unless writing has failed already."""
        if self._failure is not None:
            return
        view = memoryview(data)
        self._hash.update(view)
        self.size += len(view)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            self._failure = error

    def close(self) -> FileTold:
        """Put the file on disk, and return its size and digest.

        Raises:
            StepError: something was refused on the way.
        """
        with io_errors(self.path):
            try:
                if self._failure is not None:
                    raise self._failure
                os.fsync(self._fd)
            finally:
                if self._fd >= 0:
                    os.close(self._fd)
        return FileTold(self.size, self._hash.hexdigest())


def holds_tensors(table: object) -> bool:
    """Return whether a section of a state is a table of tensors, which a file of its own takes."""
    import torch

    if not isinstance(table, Mapping) or not table:
        return False
    return all(isinstance(value, torch.Tensor) for value in table.values())


def write_bytes(path: Path, data: bytes) -> FileTold:
    """Write a new small file and put it on disk.

    Raises:
        StepError: the disk refuses.
    """
    file = HashedFile(path)
    file.write(data)
    return file.close()


def write_tensors(
    path: Path, tensors: "Mapping[str, torch.Tensor]", world: World
) -> FileTold | None:
    """Write tensors into a new .safetensors file; all processes call it, the first writes.

    Returns:
        Size and digest, in the first process.

    Raises:
        StepError: in every process, where the first one cannot write.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    specs = {n: TensorSpec(CODES[str(t.dtype)], tuple(t.shape)) for n, t in ordered}
    file = HashedFile(path) if world.is_first else None
    if file:
        file.write(make_header(specs, {})[0])
    for _, tensor in ordered:
        whole = gathered(tensor)
        if file:
            file.write(_bytes_of(whole))
        del whole  # before the next one is gathered
    told = agreed(world, lambda: file.close() if file else None)
    return FileTold(*told) if world.is_first and told else None


def fill(target: "torch.Tensor", read: "Callable[[], torch.Tensor]", world: World) -> None:
    """Copy a whole tensor into the processes' shards, or into what each of them holds.

    Args:
        read: returns it; only the first process is asked.
    """
    import torch
    from torch.distributed.tensor import DTensor, distribute_tensor

    with torch.no_grad():
        if world.size == 1 and not isinstance(target, DTensor):
            target.copy_(read())
            return
        if world.is_first:
            whole = read().to(world.device)
        else:
            whole = torch.empty(target.shape, dtype=target.dtype, device=world.device)
        if isinstance(target, DTensor):
            spread = distribute_tensor(whole, target.device_mesh, target.placements)
            target.to_local().copy_(spread.to_local())
            return
        target.copy_(_broadcast(whole))


def agreed(world: World, act: Callable[[], T]) -> T:
    """Let the first process act; return in every process what it found, as JSON has it.

    Raises:
        SurgeryError: in every process what the first one raised.
    """
    if world.size == 1:
        return act()
    failure: errors.SurgeryError | None = None
    raw = b""
    if world.is_first:
        try:
            raw = json.dumps({"found": act()}).encode()
        except errors.SurgeryError as error:
            failure = error
            parts = (type(error).__name__, error.place, error.fact, error.remedy)
            raw = json.dumps({"failure": parts}).encode()
    raw = _broadcast_bytes(raw, world)
    if failure is not None:
        raise failure
    told = json.loads(raw)
    if "failure" in told:
        kind, *parts = told["failure"]
        raise getattr(errors, kind, errors.SurgeryError)(*parts)
    found: T = told["found"]
    return found


def gathered(tensor: "torch.Tensor") -> "torch.Tensor":
    """Return a whole tensor; every process takes part where it is sharded."""
    from torch.distributed.tensor import DTensor

    value = tensor.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def _bytes_of(tensor: "torch.Tensor") -> memoryview:
    """Return the bytes of a tensor in memory order of its axes."""
    import torch

    flat = tensor.cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _broadcast(whole: "torch.Tensor") -> "torch.Tensor":
    """Send a tensor from the first process to all, as bytes: any dtype passes."""
    import torch
    from torch import distributed

    flat = whole.contiguous().reshape(-1)
    distributed.broadcast(flat.view(torch.uint8), 0)
    return flat.reshape(whole.shape)


def _broadcast_bytes(raw: bytes, world: World) -> bytes:
    import torch
    from torch import distributed

    length = torch.tensor([len(raw)], dtype=torch.int64, device=world.device)
    distributed.broadcast(length, 0)
    text = torch.zeros(int(length), dtype=torch.uint8)
    if world.is_first:
        text = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    text = text.to(world.device)
    distributed.broadcast(text, 0)
    return text.cpu().numpy().tobytes()
