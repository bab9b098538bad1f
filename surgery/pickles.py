"""The pickled weights of one file, by torch's restricted loader: tensors, and no code."""

import os
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.checkpoint.header import LOOKALIKES, open_regular, quoted
from surgery.checkpoint.jsonfile import read_json_object
from surgery.checkpoint.layout import PICKLES, contained
from surgery.errors import CheckpointError

if TYPE_CHECKING:
    import torch

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
ZIP = b"PK\x03\x04"
NESTED = ("state_dict", "model_state_dict", "model")  # where training programs keep the weights
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
GLOBAL = re.compile(r"GLOBAL ([\w.]+)")  # as torch names what it does not load
BOILERPLATE = re.compile(r".*WeightsUnpickler error: |Weights only load failed\. ", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Pickles:
    """The pickled files of a checkpoint and, of shards, the file of each tensor by the index."""

    files: tuple[Path, ...]
    index: Mapping[str, str] | None = None

    def check(self, file: Path, names: Iterable[str]) -> None:
        """Make sure that a shard holds what the index says.

        Raises:
            CheckpointError: a tensor is missing from the shard, or not in the index.
        """
        if self.index is None:
            return
        told = {name for name, shard in self.index.items() if shard == file.name}
        differing = sorted(told.symmetric_difference(names))
        if differing:
            fact = f"the index and the file disagree about {quoted(differing[0])}"
            raise CheckpointError(file, fact, "they are of two models")


@dataclass(frozen=True, slots=True)
class Loaded:
    """The tensors of one file, and what was noticed."""

    tensors: "Mapping[str, torch.Tensor]"
    notes: tuple[str, ...] = ()


def find_pickles(path: Path, choice: str | None) -> Pickles:
    """Find the pickled weights at `path`: the file itself, or those of a directory.

    Raises:
        CheckpointError: there are none, or several to choose from.
    """
    if not path.is_dir():
        if path.suffix not in PICKLES:
            remedy = f"name a directory or a file ({', '.join(PICKLES)})"
            raise CheckpointError(path, "is no pickled checkpoint", remedy)
        return Pickles((path,))
    names = sorted(entry.name for entry in path.iterdir())
    chosen = choice or _choose(path, names)
    if chosen not in names:
        raise CheckpointError(path, f"holds no file {chosen!r}", "check --weights")
    if chosen.endswith(".index.json"):
        return _indexed(path, contained(path, chosen))
    return Pickles((contained(path, chosen),))


def _choose(root: Path, names: list[str]) -> str:
    if SINGLE in names and INDEX in names:
        fact = f"holds both {SINGLE} and {INDEX}, which may be two different models"
        raise CheckpointError(root, fact, f"choose one with --weights {INDEX} (or {SINGLE})")
    found = next((name for name in (INDEX, SINGLE) if name in names), None)
    if found:
        return found
    others = [name for name in names if name.endswith(PICKLES)]
    remedy = f"choose one with --weights {others[0]}" if others else "name a pickled checkpoint"
    raise CheckpointError(root, f"holds no {SINGLE} and no {INDEX}", remedy)


def _indexed(root: Path, index: Path) -> Pickles:
    mapping = read_json_object(index).get("weight_map")
    sound = isinstance(mapping, dict) and all(_is_plain(name) for name in mapping.values())
    if not isinstance(mapping, dict) or not mapping or not sound:
        fact = "has no weight_map of plain file names"
        raise CheckpointError(index, fact, "the index is damaged or forged")
    files = tuple(contained(root, name) for name in sorted(set(mapping.values())))
    return Pickles(files, mapping)


def _is_plain(name: object) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(PICKLES)
        and name.isprintable()
        and not {"/", "\\"} & set(name)
    )


def load_tensors(file: Path) -> Loaded:
    """Load the tensors of one pickled file with `weights_only`, mapped where its layout allows.

    Raises:
        CheckpointError: not a checkpoint of torch, compressed, truncated, with anything in it
            that is no tensor, or with names that safetensors cannot hold.
    """
    mapped = _is_zip(file)
    if mapped:
        _check_zip(file)
    document = _load(file, mapped=mapped)
    tensors, notes = _state_dict(file, document)
    for name, value in tensors.items():
        _check_entry(file, name, value)
    if not tensors:
        raise CheckpointError(file, "holds no tensors", "name a file with weights")
    return Loaded({name: value.detach() for name, value in tensors.items()}, notes)


def _is_zip(file: Path) -> bool:
    fd = open_regular(file)
    try:
        first = os.pread(fd, 512, 0)
    finally:
        os.close(fd)
    if not first:
        raise CheckpointError(file, "is empty", "copy it again")
    for magics, what, remedy in LOOKALIKES:
        if "pickle" not in what and first.lstrip().lower().startswith(magics):
            raise CheckpointError(file, f"is {what}", remedy)
    return first.startswith(ZIP)


def _check_zip(file: Path) -> None:
    """Refuse compressed records: torch.save writes none, and a small one may fill the memory."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(
            file, "is a damaged or truncated zip file", "copy it again"
        ) from error
    stored = all(r.compress_type == zipfile.ZIP_STORED for r in records)
    if not stored or sum(r.file_size for r in records) > file.stat().st_size:
        fact = "holds compressed records, which torch.save does not write"
        raise CheckpointError(file, fact, "do not trust it: get the original")


def _load(file: Path, *, mapped: bool) -> Any:  # noqa: ANN401 - whatever was pickled
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(  # noqa: TID251 - the one place, restricted
                file, map_location="cpu", weights_only=True, mmap=mapped
            )
    except Exception as error:  # torch raises nearly any type for a bad file
        code = GLOBAL.search(str(error))
        if code:
            fact = f"holds pickled code ({code[1]}), which is not run"
            raise CheckpointError(file, fact, "get the weights as safetensors") from error
        told = BOILERPLATE.sub("", str(error))
        first = next(filter(None, (line.strip() for line in told.splitlines())), "no reason given")
        fact = f"torch cannot load it ({type(error).__name__}: {first[:120]})"
        raise CheckpointError(file, fact, "it is damaged, or no state dict") from error


def _state_dict(file: Path, document: Any) -> tuple[dict[Any, Any], tuple[str, ...]]:  # noqa: ANN401
    import torch

    if isinstance(document, dict):
        for key in NESTED:
            inner = document.get(key)
            if isinstance(inner, dict) and not isinstance(inner, torch.Tensor):
                left = ", ".join(str(name) for name in document if name != key)
                note = f"{file.name}: took the weights from {key!r}"
                return dict(inner), (note + (f", left out {left}" if left else ""),)
        return dict(document), ()
    fact = f"holds a {type(document).__name__}, not a state dict of tensors"
    raise CheckpointError(file, fact, "save model.state_dict()")


def _check_entry(file: Path, name: object, value: object) -> None:
    import torch

    if not isinstance(name, str) or name == "__metadata__" or CONTROL.search(name):
        fact = f"names a tensor {quoted(str(name))}, which safetensors cannot hold"
        raise CheckpointError(file, fact, "rename it where the file was made")
    if not isinstance(value, torch.Tensor):
        fact = f"{quoted(name)} is a {type(value).__name__}, not a tensor"
        raise CheckpointError(file, fact, "save model.state_dict() alone")
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        fact = f"{quoted(name)} is not a plain dense tensor"
        raise CheckpointError(file, fact, "make it dense where the file was made")


def shares_with(tensors: "Mapping[str, torch.Tensor]") -> Iterator[tuple[str, str]]:
    """Yield (first name, further name) for each tensor that is stored under several names."""
    first: dict[object, str] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            view = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if view in first:
                yield first[view], name
            first.setdefault(view, name)
