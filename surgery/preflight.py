"""What can be known to go wrong before the first weight is read."""

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from surgery.checkpoint import Checkpoint, View
from surgery.checkpoint.layout import CARRIED_FOLDERS
from surgery.disk import cannot_write
from surgery.errors import PlanError
from surgery.plan import Plan, Step
from surgery.shards import SHARD_SIZE, Layout, lay_out
from surgery.slices import CHUNK, PART, grid
from surgery.write import is_occupied, partial_folder

SLACK = 16 << 20  # bytes for config, tokenizer, record and the file system's own
MEMORY = 1 << 30
TEMPORARIES = 8  # vectors of a part that a function holds beside its inputs
# What stands in a model's directory; a run with --force replaces nothing else.
MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".md", ".py", ".tiktoken")
MODEL_NAMES = ("LICENSE", "NOTICE", "LICENCE", ".gitattributes")


@dataclass(frozen=True, slots=True)
class Preflight:
    """What a run would need and where it would write.

    Attributes:
        disk: bytes the output takes.
        free: bytes free where it goes.
        memory: bytes of buffers and whole tensors held at once, at most.
    """

    layout: Layout
    disk: int
    free: int
    memory: int


def default_workers() -> int:
    """Return the number of threads: enough to keep a disk busy, no more than helps."""
    return max(8, min(os.cpu_count() or 1, 16))


def computing_workers() -> int:
    """Return the number of threads for arithmetic: one a core, and one for the disk.

    More of them wait for one another (measured on 2 cores: with 8 threads ties takes twice the
    time that it takes with 3).
    """
    return min((os.cpu_count() or 1) + 1, 16)


def preflight(
    plan: Plan,
    out: Path,
    *,
    force: bool = False,
    memory: int = MEMORY,
    workers: int | None = None,
    shard_size: int = SHARD_SIZE,
) -> Preflight:
    """Check the output path, aliasing, memory and disk of a run without touching anything.

    Raises:
        PlanError: the run could not succeed, or would destroy something.
    """
    check_output(plan, out, force=force)
    threads = fitting_workers(plan, workers=workers, memory=memory)
    peak = peak_memory(plan, workers=threads, memory=memory)
    size = plan.bytes_out + 1 if plan.one_file else shard_size
    layout = lay_out(plan.outputs, shard_size=size, stem=plan.stem)
    disk = layout.size + SLACK + sum(path.stat().st_size for path in plan.carried)
    disk += sum(len(data) for data in plan.written.values())
    free = shutil.disk_usage(out.parent).free
    if disk > free + _already_there(out):
        fact = f"needs {disk / 1e9:.2f} GB of disk, but {free / 1e9:.2f} GB are free"
        raise PlanError(out, fact, "free some space, or choose another disk")
    return Preflight(layout, disk, free, peak)


def check_output(plan: Plan, out: Path, *, force: bool) -> None:
    """Refuse an output that exists, that is an input, or that could not be written.

    Raises:
        PlanError: with the reason and the remedy.
    """
    check_place(out, plan.sources, bare=plan.bare, force=force)


def check_place(out: Path, sources: Iterable[Checkpoint], *, bare: bool, force: bool) -> None:
    """Refuse an output as `check_output` does, before there is a plan.

    Raises:
        PlanError: with the reason and the remedy.
    """
    if bare and out.suffix != ".safetensors":
        remedy = f"name it {out.name}.safetensors"
        raise PlanError(out, "the output of a bare file is a bare .safetensors file", remedy)
    if not bare and out.suffix == ".safetensors":
        raise PlanError(out, "the output of a directory is a directory", "drop the suffix")
    for source in sources:
        _refuse_alias(source, out)
    if not out.parent.is_dir():
        raise PlanError(out, f"its folder {out.parent} does not exist", "create it first")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise cannot_write(out, PermissionError(13, "no permission to write there"))
    if is_occupied(out):
        _refuse_occupied(out, bare=bare, force=force)


def _refuse_occupied(out: Path, *, bare: bool, force: bool) -> None:
    if not force:
        raise PlanError(out, "exists already", "choose another output, or replace it with --force")
    if bare and out.is_dir():
        raise PlanError(out, "is a directory, which a file does not replace", "choose another name")
    if not bare and not _is_model(out):
        fact = "holds something else than a model, which --force does not replace"
        raise PlanError(out, fact, "choose another output, or remove it yourself")
    foreign = None if bare else _foreign(out)
    if foreign is not None:
        fact = f"holds {foreign}, which is no part of a model and would be lost"
        raise PlanError(out, fact, "move it away, or choose another output")


def _is_model(path: Path) -> bool:
    if not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir()}
    configs = {"config.json", "adapter_config.json"} & names
    return bool(configs) and any(name.endswith(".safetensors") for name in names)


def _foreign(out: Path) -> str | None:
    """Name an entry of a model's directory that is no file of a model."""
    for path in sorted(out.iterdir()):
        known = path.name.startswith(MODEL_NAMES) or path.suffix in MODEL_SUFFIXES
        if path.is_dir() and path.name not in CARRIED_FOLDERS:
            return f"{path.name}/"
        if not path.is_dir() and not known:
            return path.name
    return None


def _refuse_alias(source: Checkpoint, out: Path) -> None:
    target = _real(out)
    own = [file.resolve() for file in source.files]
    own += [] if source.bare else [source.root.resolve()]
    if any(target == path or _same_file(out, path) for path in own):
        raise PlanError(out, f"is the input {source.ref}", "choose another output")
    if any(path.is_relative_to(target) for path in own):
        raise PlanError(out, f"holds the input {source.ref}", "choose another output")
    if not source.bare and target.is_relative_to(source.root.resolve()):
        raise PlanError(out, f"lies inside the input {source.ref}", "choose another output")


def _real(out: Path) -> Path:
    """Resolve links in the output's path, whether or not it exists yet."""
    return out.resolve() if os.path.lexists(out) else out.parent.resolve() / out.name


def _same_file(out: Path, path: Path) -> bool:
    return out.exists() and out.samefile(path)


def _already_there(out: Path) -> int:
    """Bytes that an interrupted run has already taken for this output."""
    try:
        return sum(p.stat().st_blocks * 512 for p in (partial_folder(out) / "out").iterdir())
    except OSError:  # there is none, or another run is just putting it in place
        return 0


def fitting_workers(plan: Plan, *, workers: int | None, memory: int) -> int:
    """Return how many threads to run: as asked, but no more than their buffers fit the budget."""
    computes = any(step.inputs and not step.is_copy for step in plan.steps)
    usual = computing_workers() if computes else default_workers()
    return max(1, min(workers or usual, memory // _most_sliced(plan)))


def peak_memory(plan: Plan, *, workers: int, memory: int) -> int:
    """Return the bytes of buffers and whole tensors that a run holds at once.

    Raises:
        PlanError: one step alone needs more than the budget.
    """
    whole = max(plan.steps, key=lambda step: step.whole_bytes, default=None)
    if whole and whole.whole_bytes > memory:
        need = whole.whole_bytes / (1 << 20)
        what = "" if whole.streamed else "the whole tensor, "
        fact = f"{whole.why} holds {what}{need:.0f} MiB at once, over the budget"
        raise PlanError(whole.outputs[0][0], fact, f"allow it with --memory {need + 1:.0f}M")
    return workers * _most_sliced(plan) + min(memory, workers * whole.whole_bytes if whole else 0)


def _most_sliced(plan: Plan) -> int:
    """Bytes that one worker holds for the widest step that is sliced."""
    return max((_slice_bytes(s) for s in plan.steps if s.is_sliced and s.inputs), default=CHUNK)


def _slice_bytes(step: Step) -> int:
    """Bytes one worker holds for a slice: what is read and written, and temporaries of parts."""
    if step.is_copy:
        return CHUNK
    cut = grid(step)
    stored = sum(-(-tensor.nbytes * cut.chunk // max(cut.total, 1)) for tensor in step.stored)
    written = step.bytes_out * cut.chunk // max(cut.total, 1)
    views = step.width * cut.chunk * len(step.inputs) * step.has_views
    views += sum(tensor.held for tensor in step.inputs if isinstance(tensor, View))
    vectors = len(step.inputs) + TEMPORARIES
    return stored + written + views + vectors * max(cut.part, PART) * step.width
