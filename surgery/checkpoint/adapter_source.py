"""An adapter as a source of tensors, for what is made of adapters alone."""

import os
from dataclasses import dataclass
from pathlib import Path

from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.checkpoint.adapters import CONFIG, Adapter, open_adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSource(Checkpoint):
    """An adapter's file, opened like a checkpoint; it has no config.json.

    Attributes:
        adapter: what the tensors mean.
    """

    adapter: Adapter


def open_adapter_source(
    ref: str | Path,
    *,
    weights: str | None = None,
    allow_download: bool = False,
    replicating: bool = False,
) -> AdapterSource:
    """Open an adapter; `weights` is what other sources take, and has to name its one file.

    Args:
        ref: a directory or hub ref.
        weights: not used.
        allow_download, replicating: as `open_adapter` takes them.

    Raises:
        CheckpointError: it is no LoRA adapter, or of a kind that is not read.
    """
    del weights
    adapter = open_adapter(ref, allow_download=allow_download, replicating=replicating)
    return AdapterSource(
        ref=str(ref),
        root=adapter.root,
        tensors=adapter.tensors,
        files=(adapter.file,),
        revision=adapter.revision,
        stamps={adapter.file: adapter.stamp},
        adapter=adapter,
    )


def open_any(ref: str | Path, *, weights: str | None = None) -> Checkpoint:
    """Open a checkpoint, or the adapter that lies in a directory without a model."""
    config, own = (Path(ref).expanduser() / name for name in (CONFIG, "config.json"))
    if os.path.exists(config) and not os.path.exists(own):  # noqa: PTH110 - false for no path
        return open_adapter_source(ref, replicating=True)
    return open_checkpoint(ref, weights=weights)
