"""Read pickled checkpoints without running any of their code, and plan their conversion."""

import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.anatomy import EMBEDDING, HEAD
from surgery.checkpoint import Checkpoint, TensorInfo, stamp
from surgery.checkpoint.layout import carried_files, read_config
from surgery.checkpoint.refs import resolve
from surgery.errors import CheckpointError
from surgery.pickles import Pickles, find_pickles, load_tensors, shares_with
from surgery.plan import Plan, Step, TensorSpec, check_plan
from surgery.slices import Sources

if TYPE_CHECKING:
    import numpy as np
    import torch

DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "complex64": "C64",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "bool": "BOOL",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Pickled(Checkpoint):
    """An opened pickled checkpoint.

    Attributes:
        shared: (first name, further name) of each tensor that has several names.
    """

    shared: tuple[tuple[str, str], ...] = ()


def open_pickle(
    ref: str | Path, *, weights: str | None = None, allow_download: bool = False
) -> Pickled:
    """Open a pickled checkpoint: pytorch_model.bin, its shards, or a bare .bin, .pt, .pth file.

    torch maps the files and builds tensors only; anything else in a pickle is refused unread.
    The result is a source for `convert` alone, whose plan knows how to read it.

    Args:
        ref: a path, `org/name` or `org/name@revision`.
        weights: the weight or index file to take in a directory that holds several.
        allow_download: fetch a hub ref that the local cache does not hold.

    Raises:
        CheckpointError: nothing to read, or not a plain state dict of tensors.
    """
    found = resolve(ref, allow_download=allow_download, pickles=True)
    bare = not found.path.is_dir()
    root = found.path.parent if bare else found.path.resolve()
    chosen = find_pickles(found.path, weights)
    config = None if bare else read_config(root)
    parts = [_examine(file, chosen) for file in chosen.files]
    return Pickled(
        ref=str(ref),
        root=root,
        tensors=_joined(parts),
        files=chosen.files,
        config=config,
        carried=() if bare else carried_files(root, config),
        revision=found.revision,
        bare=bare,
        notes=tuple(note for part in parts for note in part.notes),
        stamps={file: stamp(file) for file in chosen.files},
        shared=tuple(pair for part in parts for pair in part.shared),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What one file holds; its tensors are let go, so that one file at a time is in memory."""

    file: Path
    tensors: Mapping[str, TensorInfo]
    shared: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def _examine(file: Path, chosen: Pickles) -> _Part:
    loaded = load_tensors(file)
    chosen.check(file, loaded.tensors)
    return _Part(
        file=file,
        tensors={name: _info(name, tensor, file) for name, tensor in loaded.tensors.items()},
        shared=tuple(shares_with(loaded.tensors)),
        notes=loaded.notes,
    )


def _joined(parts: Iterable[_Part]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for part in parts:
        twice = next((name for name in part.tensors if name in tensors), None)
        if twice is not None:
            fact = f"holds {twice!r}, which another file of the model holds too"
            raise CheckpointError(part.file, fact, "the files are of two models")
        tensors |= part.tensors
    return tensors


def _info(name: str, tensor: "torch.Tensor", file: Path) -> TensorInfo:
    code = DTYPES.get(str(tensor.dtype).removeprefix("torch."))
    if code is None:
        fact = f"{name!r} is of {tensor.dtype}, which safetensors cannot hold"
        raise CheckpointError(file, fact, "convert it with the program that wrote it")
    size = tensor.numel() * tensor.element_size()
    if size > file.stat().st_size:
        fact = f"{name!r} is larger than the file: one value stands for many"
        raise CheckpointError(file, fact, "the file is damaged or forged")
    return TensorInfo(name, code, tuple(tensor.shape), file, 0, size)


def convert(source: Pickled) -> Plan:
    """Copy every tensor of a pickled checkpoint into safetensors, dtypes kept.

    Of two names for one tensor, an output head that the config ties to the embedding is left
    out; any other is stored again under its own name.
    """
    dropped, notes = _ties(source)
    kept = {name: tensor for name, tensor in source.tensors.items() if name not in dropped}
    steps = [
        Step(inputs=(tensor,), outputs=((name, TensorSpec(tensor.dtype, tensor.shape)),))
        for name, tensor in kept.items()
    ]
    return check_plan(
        Plan(
            operation="convert",
            parameters={},
            sources=(source,),
            steps=tuple(steps),
            order=tuple(kept),
            config=source.config,
            carried=source.carried,
            dropped=dropped,
            notes=(*source.notes, *notes),
            reader=PickleSources,
        )
    )


def _ties(source: Pickled) -> tuple[dict[str, str], list[str]]:
    """Return the tensors to leave out, with the reason, and what to tell of the others."""
    config = source.config or {}
    tied = any(
        part.get("tie_word_embeddings") is True
        for part in (config, config.get("text_config"))
        if isinstance(part, dict)
    )
    dropped, notes = {}, []
    for first, second in source.shared:
        pair = sorted((first, second), key=lambda name: HEAD.search(name) is not None)
        if tied and EMBEDDING.search(pair[0]) and HEAD.search(pair[1]):
            dropped[pair[1]] = f"the config ties it to {pair[0]}"
        else:
            notes.append(f"{second} is {first}: stored twice")
    return dropped, notes


class PickleSources(Sources):
    """Pickled files of a run, one at a time: mapped, or read where the old layout allows no map.

    Tensors that lie scattered in their storage are put in order one at a time too.
    """

    def __init__(self, checkpoints: Iterable[Checkpoint]) -> None:
        super().__init__(checkpoints)
        self._loading = threading.Lock()
        # One thread loads: memory that one thread frees is not what another is given.
        self._loader = ThreadPoolExecutor(max_workers=1)
        self._loaded: dict[Path, Mapping[str, torch.Tensor]] = {}
        self._ordered: dict[tuple[Path, str], np.ndarray[Any, Any]] = {}

    def __exit__(self, *_: object) -> None:
        self._loader.shutdown(wait=False)
        super().__exit__()

    def read(self, tensor: TensorInfo, at: int, view: memoryview) -> None:
        """Fill `view` with the tensor's bytes from `at` on."""
        import numpy as np

        with self._loading:
            whole = self._bytes(tensor)
        np.copyto(np.frombuffer(view, np.uint8), whole[at : at + len(view)])

    def prefetch(self, tensor: TensorInfo, at: int, count: int) -> None:
        """Leave reading ahead to the kernel, which sees the mapping."""

    def _bytes(self, tensor: TensorInfo) -> "np.ndarray[Any, Any]":
        import torch

        key = tensor.file, tensor.name
        if key in self._ordered:
            return self._ordered[key]
        stored = self._file(tensor.file)[tensor.name]
        ordered = stored.contiguous().reshape(-1)
        found: np.ndarray[Any, Any] = ordered.view(torch.uint8).numpy()
        if not stored.is_contiguous():
            self._ordered = {key: found}
        return found

    def _file(self, file: Path) -> "Mapping[str, torch.Tensor]":
        if file not in self._loaded:
            self._loaded.clear()
            self._loaded[file] = self._loader.submit(load_tensors, file).result().tensors
        return self._loaded[file]
