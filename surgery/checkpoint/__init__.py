"""Open a checkpoint: where every tensor lies, its config and files. No weight is read."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from surgery.checkpoint.header import BITS, Header, Stamp, TensorInfo, read_header
from surgery.checkpoint.layout import (
    PICKLES,
    carried_files,
    find_weights,
    read_config,
    single_file,
)
from surgery.checkpoint.refs import resolve, split_ref
from surgery.checkpoint.view import (
    View,
    make_view,
    read_rows,
    row_shape,
    rows_of,
    stored_tensors,
)
from surgery.errors import CheckpointError

__all__ = [
    "BITS",
    "Checkpoint",
    "Header",
    "Stamp",
    "TensorInfo",
    "View",
    "make_view",
    "open_checkpoint",
    "read_header",
    "read_rows",
    "row_shape",
    "rows_of",
    "stamp",
    "stored_tensors",
]


def stamp(path: Path) -> Stamp:
    """Return the identity of a file as it is now, to notice a change during a run."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An opened source.

    Attributes:
        ref: what the user typed.
        root: the directory that holds the files.
        tensors: name to place, in the order of the files' data.
        files: the weight files.
        config: the parsed config.json; None for a bare file or where there is none.
        carried: files that go along with the weights unchanged.
        revision: the commit of a hub ref; of a base with adapters those of all, joined by `+`.
        bare: a single .safetensors file rather than a directory.
        notes: what a user should know about the source.
        stamps: per weight file what changes when somebody writes to it.
        metadata: the header's own table of strings, of a bare file.
        adapters: names of the adapters that were added; the weights they change are views.
    """

    ref: str
    root: Path
    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]
    config: dict[str, Any] | None = None
    carried: tuple[Path, ...] = ()
    revision: str | None = None
    bare: bool = False
    notes: tuple[str, ...] = ()
    stamps: Mapping[Path, Stamp] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    adapters: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The last part of the path or ref, without suffix: what an output is named after."""
        if self.bare:
            own = self.files[0].stem
        elif self.revision and not self.revision.startswith("+"):
            own = split_ref(self.ref)[0].partition("@")[0].split("/")[-1]
        else:
            own = self.root.name
        return "+".join((own, *self.adapters))

    @property
    def file_names(self) -> dict[Path, str]:
        """What each weight file is called in lists and records: no two alike."""
        names: dict[Path, str] = {}
        for file in self.files:
            count = sum(other.name == file.name for other in names)
            names[file] = f"{file.name} ({count + 1})" if count else file.name
        return names

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_checkpoint(
    ref: str | Path, *, weights: str | None = None, allow_download: bool = False
) -> Checkpoint:
    """Open a Hugging Face directory, a bare .safetensors file, a hub ref or `BASE+ADAPTER`.

    Every header, the index, config.json and the other JSON files are validated; no tensor data
    is read, no code of the checkpoint is run, and the network is not used unless
    `allow_download` is given.

    Args:
        ref: a path, `org/name` or `org/name@revision`; an existing path wins. Adapters follow
            their base behind `+`.
        weights: the weight or index file to take in a directory that holds several.
        allow_download: fetch a hub ref that the local cache does not hold.

    Raises:
        CheckpointError: anything is missing, broken or not supported.
    """
    base, *adapters = split_ref(ref)
    if adapters:
        source = open_checkpoint(base, weights=weights, allow_download=allow_download)
        return _adapted(source, adapters, allow_download=allow_download)
    found = resolve(ref, allow_download=allow_download)
    path = found.path
    if path.is_dir():
        root = path.resolve() if path.name in ("", ".", "..") else path
        return _open_directory(str(ref), root, weights, found.revision)
    if path.name.endswith(PICKLES):
        remedy = f"convert it first: surgery convert {path} -o {path.stem}.safetensors"
        raise CheckpointError(path, "is a pickle file, which is not read", remedy)
    found_weights = single_file(path)
    return Checkpoint(
        ref=str(ref),
        root=path.parent,
        tensors=found_weights.tensors,
        files=found_weights.files,
        bare=True,
        metadata=found_weights.metadata,
        stamps=found_weights.stamps,
    )


def _open_directory(ref: str, root: Path, choice: str | None, revision: str | None) -> Checkpoint:
    try:
        weights = find_weights(root, choice)
        config = read_config(root)
        carried = carried_files(root, config)
    except OSError as error:
        raise CheckpointError(root, f"cannot be read ({error.strerror})") from error
    return Checkpoint(
        ref=ref,
        root=root,
        tensors=weights.tensors,
        files=weights.files,
        config=config,
        carried=carried,
        revision=revision,
        notes=weights.notes,
        stamps=weights.stamps,
    )


def _adapted(base: Checkpoint, refs: Sequence[str], *, allow_download: bool) -> Checkpoint:
    from surgery.checkpoint.adapted import Adapted
    from surgery.checkpoint.adapters import open_adapter
    from surgery.checkpoint.adapting import add_adapter

    opened = [open_adapter(ref, allow_download=allow_download) for ref in refs]
    to = Adapted(dict(base.tensors), copy.deepcopy(base.config))
    for adapter in opened:
        add_adapter(to, adapter)
    commits = [base.revision or "", *(adapter.revision or "" for adapter in opened)]
    return replace(
        base,
        ref="+".join((base.ref, *refs)),
        tensors=to.tensors,
        files=tuple(dict.fromkeys((*base.files, *(adapter.file for adapter in opened)))),
        config=to.config,
        revision="+".join(commits) if any(commits) else None,
        notes=(*base.notes, *to.notes),
        stamps={**base.stamps, **{adapter.file: adapter.stamp for adapter in opened}},
        adapters=tuple(adapter.name for adapter in opened),
    )
