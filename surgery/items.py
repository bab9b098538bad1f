"""What a worker does with one item of a step: read, compute, write, hash.

Every function returns the digests of leaves, by tensor, that the item has seen.
"""

import ctypes
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from types import ModuleType
from typing import Any, Protocol

from surgery.checkpoint import BITS, TensorInfo, View
from surgery.digest import LEAF, Leaves, checksums, leaf_digests
from surgery.plan import Pass, Step
from surgery.slices import Item, Scratch, Sources, grid, pieces

Found = dict[str, list[bytes]]
Last = Callable[..., Any]
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # as malloc.h names them


class Target(Protocol):
    """Where results go: an output on disk, or nowhere when only digests are wanted."""

    def write(self, name: str, at: int, view: memoryview) -> None:
        """Take a piece of the tensor."""

    def finish(self, line: Mapping[str, Any]) -> None:
        """Note a finished step."""

    def leave_open(self) -> None:
        """Keep descriptors open from now on: a thread that hangs may still use them."""


class DigestOnly:
    """A target that keeps nothing, to compare a run with its record."""

    def write(self, name: str, at: int, view: memoryview) -> None:
        """Drop the piece."""

    def finish(self, line: Mapping[str, Any]) -> None:
        """Note nothing."""

    def leave_open(self) -> None:
        """Hold nothing open."""


def copy_item(step: Step, item: Item, scratch: Scratch, sources: Sources, target: Target) -> Found:
    """Copy bytes to every output."""
    view = scratch.take(0, item.count)
    sources.read(step.inputs[0], item.start, view)
    leaves = leaf_digests(view)
    for name, _ in step.outputs:
        target.write(name, item.start, view)
    return {key_of(step.inputs[0]): leaves, **{name: leaves for name, _ in step.outputs}}


def digest_item(tensor: TensorInfo, item: Item, scratch: Scratch, sources: Sources) -> Found:
    """Hash bytes that a view is made of."""
    view = scratch.take(0, item.count)
    sources.read(tensor, item.start, view)
    return {key_of(tensor): checksums(view)}


def map_item(
    step: Step,
    item: Item,
    scratch: Scratch,
    sources: Sources,
    target: Target,
    *,
    last: Last | None,
) -> Found:
    """Compute and write the item's parts, by `last` or the step's own function."""
    places = grid(step)
    widths = [BITS[spec.dtype] // 8 for _, spec in step.outputs]
    backend = backend_of(step)
    reading = backend.Reading(step, places, sources, scratch)
    room = min(places.chunk, item.count)
    buffers = [
        scratch.take(slot, room * width)
        for slot, width in enumerate(widths, start=len(step.inputs))
    ]
    hashed = [Leaves(leaf_digests) for _ in widths]
    fn = last or _flat(step)
    parts = reading.parts(item.start, item.count)
    for start, count in backend.write_parts(fn, parts, step.outputs, buffers):
        for (name, _), view, width, leaves in zip(
            step.outputs, buffers, widths, hashed, strict=True
        ):
            filled = view[: count * width]
            leaves.feed(filled)
            target.write(name, start * width, filled)
    found = {key_of(step.inputs[slot]): leaves.end() for slot, leaves in reading.leaves.items()}
    outputs = zip(step.outputs, hashed, strict=True)
    return {**found, **{name: leaves.end() for (name, _), leaves in outputs}}


def whole_step(step: Step, sources: Sources, target: Target) -> Found:
    """Compute and write whole tensors."""
    from surgery.compute import compute_whole

    plain = [n for n, tensor in enumerate(step.inputs) if not isinstance(tensor, View)]
    hashed = {slot: Leaves(checksums) for slot in plain}
    results = compute_whole(step, sources, hashed)
    leaves = {key_of(step.inputs[slot]): found.end() for slot, found in hashed.items()}
    for view, name in results:
        leaves[name] = leaf_digests(view)
        for start, count in pieces(len(view)):
            target.write(name, start, view[start : start + count])
    return leaves


def stream_step(step: Step, sources: Sources, target: Target, told: dict[str, float]) -> Found:
    """Compute and write in blocks what reads its inputs when they are indexed."""
    from surgery.stored import stream

    plain = [n for n, tensor in enumerate(step.inputs) if not isinstance(tensor, View)]
    hashed = {slot: Leaves(checksums) for slot in plain}
    written = {name: Leaves(leaf_digests) for name, _ in step.outputs}
    at = dict.fromkeys(written, 0)
    for name, view in stream(step, sources, hashed, told):
        target.write(name, at[name], view)
        written[name].feed(view)
        at[name] += len(view)
    assert told.keys() <= set(step.tells), "untold figures"  # noqa: S101
    found = {key_of(step.inputs[slot]): each.end() for slot, each in hashed.items()}
    return {**found, **{name: each.end() for name, each in written.items()}}


def ask_item(
    step: Step, item: Item, scratch: Scratch, sources: Sources, request: Pass
) -> list[Any]:
    """Return what a pass finds in the item's parts."""
    reading = backend_of(step).Reading(step, grid(step), sources, scratch, identify=False)
    sampled = item.phase == "sample"
    parts = reading.sample() if sampled else reading.parts(item.start, item.count)
    return [request.fn(part, *inputs) for part, inputs in parts]


def unwarned(step: Step) -> AbstractContextManager[Any]:
    """Keep numpy from printing what it thinks of NaN and infinity: results are checked."""
    if step.fn is None:
        return nullcontext()
    import numpy as np

    return np.errstate(all="ignore")


@cache
def keep_freed_memory() -> None:
    """Let the C library keep what a part's temporaries free: the next part takes it again.

    By default it gives the pages back each time, and the kernel clears them anew (measured: up
    to a quarter of a merge's CPU time). Only where the C library is glibc.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(TRIM_THRESHOLD, 256 << 20)
        libc.mallopt(MMAP_THRESHOLD, 32 << 20)


def backend_of(step: Step) -> ModuleType:
    """Return what computes a step: numpy where it is enough, so that torch is not loaded."""
    from surgery import arrays

    keep_freed_memory()
    if arrays.can_compute(step):
        return arrays
    from surgery import compute

    compute.use_one_thread()
    return compute


def _flat(step: Step) -> Callable[..., Any]:
    """Turn an elementwise function into one of a part; none gives each output what it is given."""
    fn, copies = step.fn, len(step.outputs)
    return lambda _, *inputs: fn(*inputs) if fn else inputs * copies


def key_of(tensor: TensorInfo) -> str:
    """Name an input so that it cannot be taken for an output: a path ends in a colon."""
    return f"{tensor.file}:{tensor.name}"


def zeros_step(step: Step) -> Found:
    """Hash what is not written: a new shard's blocks read as zeros."""
    found = {}
    for name, spec in step.outputs:
        whole, rest = divmod(spec.nbytes, LEAF)
        full = leaf_digests(memoryview(bytes(LEAF))) if whole else []
        found[name] = full * whole + leaf_digests(memoryview(bytes(rest)))
    return found
