"""Find the weights and the files to carry along in a Hugging Face directory."""

import json
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.checkpoint.header import Stamp, TensorInfo, quoted, read_header
from surgery.checkpoint.jsonfile import read_json_object
from surgery.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_NESTING = 100  # of a config, which is walked by recursion when it is changed
MAX_NAME = 255  # bytes of a file name, on every usual file system
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
WEIGHT_SUFFIXES = (*PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".incomplete")
# Never carried: the record and the card are written anew, an index belongs to its shards.
NOT_CARRIED = ("README.md", "surgery.json", ".gitattributes")
# Read by transformers when the output is loaded; any other JSON file is carried as it is.
JSON_OBJECTS = tuple(
    f"{stem}.json"
    for stem in (
        *("generation_config", "tokenizer", "tokenizer_config", "special_tokens_map"),
        *("added_tokens", "vocab", "chat_template", "processor_config"),
        *("preprocessor_config", "video_preprocessor_config"),
    )
)
CARRIED_FOLDERS = ("additional_chat_templates",)


@dataclass(frozen=True, slots=True)
class Weights:
    """The weight files of a checkpoint, their tensors by name, and what was noticed.

    Attributes:
        metadata: the header's own table of strings, where there is one file.
        stamps: each file as it was when its header was read.
    """

    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo]
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    stamps: Mapping[Path, Stamp] = field(default_factory=dict)


def find_weights(root: Path, choice: str | None) -> Weights:
    """Find, read and cross-check the headers of the weights in the directory `root`.

    Args:
        root: a directory.
        choice: the name of the weight or index file to take where there are several.

    Raises:
        CheckpointError: nothing to read, an ambiguous choice, a broken header or index, or a
            file that lies outside the directory.
    """
    names = sorted(entry.name for entry in root.iterdir())
    chosen = choice or _choose(root, names)
    if chosen not in names:
        raise CheckpointError(root, f"holds no file {chosen!r}", "check --weights")
    if chosen.endswith(".index.json"):
        weights = _indexed(root, root / chosen)
    else:
        weights = single_file(contained(root, chosen))
    notes = _extras(names, weights.files)
    return Weights(weights.files, weights.tensors, notes, stamps=weights.stamps)


def single_file(path: Path) -> Weights:
    """Read one .safetensors file."""
    header = read_header(path)
    tensors = {tensor.name: tensor for tensor in header.tensors}
    if not tensors:
        raise CheckpointError(path, "holds no tensors", "name a file with weights")
    return Weights((path,), tensors, metadata=header.metadata, stamps={path: header.stamp})


def _choose(root: Path, names: Sequence[str]) -> str:
    if SINGLE in names and INDEX in names and _shards(root) != {SINGLE}:
        fact = f"holds both {SINGLE} and {INDEX}, which may be two different models"
        raise CheckpointError(root, fact, f"choose one with --weights {INDEX} (or {SINGLE})")
    for name in (INDEX, SINGLE):
        if name in names:
            return name
    raise CheckpointError(root, *_why_no_weights(root, names))


def _shards(root: Path) -> set[str]:
    """Name the files of the index; some savers write one even for a single file."""
    return set(_weight_map(contained(root, INDEX)).values())


def _why_no_weights(root: Path, names: Sequence[str]) -> tuple[str, str]:
    loose = [n for n in names if n.endswith(".safetensors") and not n.startswith("consolidated")]
    if "adapter_config.json" in names:
        return "holds a LoRA adapter, not a model", f"name its base too: BASE+{root}"
    if len(loose) == 1:
        return f"holds {loose[0]}, but no {SINGLE}", f"name the file itself: {root / loose[0]}"
    if loose:
        return f"holds {len(loose)} .safetensors files, but no {INDEX}", "restore the index file"
    return _other_weights(root, names)


def _other_weights(root: Path, names: Sequence[str]) -> tuple[str, str]:
    pickles = [n for n in names if n.endswith(PICKLES)]
    if pickles:
        remedy = f"convert it first: surgery convert {root} -o {root.name}-safetensors"
        return f"holds pickled weights ({pickles[0]}), which are not read", remedy
    if any(n.endswith(".incomplete") for n in names):
        return "holds an unfinished download (*.incomplete)", "finish the download"
    if any(n.endswith(".gguf") for n in names):
        return "holds GGUF weights only", "use the original Hugging Face checkpoint"
    models = [n for n in names if (root / n / SINGLE).is_file() or (root / n / INDEX).is_file()]
    if models:
        return "holds no weights itself", f"name the model in it: {root / min(models)}"
    return f"holds no weights ({SINGLE} or {INDEX})", "name a model directory"


def _indexed(root: Path, index: Path) -> Weights:
    mapping = _weight_map(contained(root, index.name))
    files = {name: contained(root, name) for name in sorted(set(mapping.values()))}
    tensors: dict[str, TensorInfo] = {}
    stamps: dict[Path, Stamp] = {}
    for name, path in files.items():
        header = read_header(path)
        stamps[path] = header.stamp
        for tensor in header.tensors:
            if mapping.get(tensor.name) != name:
                told = mapping.get(tensor.name)
                where = f"the index places it in {told}" if told else "the index does not name it"
                fact = f"holds the tensor {quoted(tensor.name)}, but {where}"
                raise CheckpointError(path, fact, "the index and the shards are of two models")
            tensors[tensor.name] = tensor
    missing = [name for name in mapping if name not in tensors]
    if missing:
        shard = files[mapping[missing[0]]].name
        fact = f"names {quoted(missing[0])} in {shard}, which does not hold it"
        raise CheckpointError(index, fact, "the index and the shards are of two models")
    return Weights(tuple(files.values()), tensors, stamps=stamps)


def _weight_map(index: Path) -> dict[str, str]:
    mapping = read_json_object(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(index, "has no weight_map", "restore the index file")
    for tensor, name in mapping.items():
        if not isinstance(name, str) or not _is_plain_shard(name):
            shown = quoted(name) if isinstance(name, str) else type(name).__name__
            fact = f"places {quoted(tensor)} in {shown}, which is no .safetensors file beside it"
            raise CheckpointError(index, fact, "the index is damaged or forged")
    return mapping


def _is_plain_shard(name: str) -> bool:
    if not name.endswith(".safetensors") or not name.isprintable():
        return False
    return not {"/", "\\"} & set(name) and len(os.fsencode(name)) <= MAX_NAME


def contained(root: Path, name: str) -> Path:
    """Return `root/name` after checking that links do not lead it out of the model.

    A link may lead to the `blobs` folder of the hub cache that `root` is a snapshot of.

    Raises:
        CheckpointError: the file is missing, or lies elsewhere.
    """
    path = root / name
    try:
        real = path.resolve(strict=True)
    except RuntimeError as error:  # Python 3.11 and 3.12; from 3.13 on it is an OSError
        raise CheckpointError(path, "is a link that leads to itself", "copy it again") from error
    except OSError as error:
        fact = f"is missing ({error.strerror})" if error.errno else "is missing"
        raise CheckpointError(path, fact, "the checkpoint is incomplete: copy it again") from error
    home = root.resolve()
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(real.is_relative_to(place) for place in allowed):
        fact = f"is a link out of the model's directory (to {real})"
        raise CheckpointError(path, fact, "copy the file in, or name its own directory")
    return path


def _extras(names: Iterable[str], used: Sequence[Path]) -> tuple[str, ...]:
    taken = {path.name for path in used}
    extra = [n for n in names if n.endswith(".safetensors") and n not in taken]
    return (f"ignored weight files that the index does not use: {', '.join(extra)}",) * bool(extra)


def read_config(root: Path) -> dict[str, Any] | None:
    """Read config.json, or return None where there is none."""
    if not (root / "config.json").exists() and not (root / "config.json").is_symlink():
        return None
    path = contained(root, "config.json")
    config = read_json_object(path)
    if _is_deeper(config, MAX_NESTING):
        raise CheckpointError(path, f"is nested deeper than {MAX_NESTING} levels")
    try:
        json.dumps(config, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(path, "holds a lone surrogate, which is not Unicode text") from error
    return config


def _is_deeper(value: object, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(inner) and (levels == 0 or any(_is_deeper(v, levels - 1) for v in inner))


def carried_files(root: Path, config: dict[str, Any] | None) -> tuple[Path, ...]:
    """List the files that go along unchanged: tokenizer, templates, generation config, licence.

    Weights, the index, the old card and record stay behind. Python files go along only where
    the config's `auto_map` needs them; they are copied as bytes and never run.

    Raises:
        CheckpointError: a file is a link out of the directory, or a broken JSON file.
    """
    wants_code = bool(config and config.get("auto_map"))
    files = []
    for path in sorted(root.iterdir()):
        if path.name in CARRIED_FOLDERS and path.is_dir():
            files += [contained(root, f"{path.name}/{p.name}") for p in sorted(path.iterdir())]
        elif _is_carried(path, wants_code=wants_code):
            files.append(contained(root, path.name))
    for path in files:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(path, "is not a regular file", "remove it")
        if path.name in JSON_OBJECTS:
            read_json_object(path)
    return tuple(files)


def _is_carried(path: Path, *, wants_code: bool) -> bool:
    name = path.name
    if name in NOT_CARRIED or name == "config.json" or name.startswith("."):
        return False
    if name.endswith((*WEIGHT_SUFFIXES, ".index.json")) or path.is_dir():
        return False
    return wants_code or not name.endswith(".py")
