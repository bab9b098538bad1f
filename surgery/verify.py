"""Check a checkpoint: whole, in agreement with its config, finite, as recorded, loadable."""

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from surgery.anatomy import Anatomy, anatomy, dig
from surgery.checkpoint import Checkpoint, read_header
from surgery.checkpoint.adapter_source import AdapterSource
from surgery.checkpoint.jsonfile import read_small_file
from surgery.checkpoint.layout import contained
from surgery.digest import ALGORITHM
from surgery.engine import Engine, Progress
from surgery.errors import SurgeryError
from surgery.finite import count_nonfinite
from surgery.plan import Step, TensorSpec
from surgery.preflight import MEMORY, default_workers
from surgery.provenance import RECORD, header_digest, is_sealed, read_record, record_text
from surgery.run import allow_many_files
from surgery.slices import Sources

# Files that change what a model does, and that must not turn up unrecorded.
READ_BY_LOADERS = (".json", ".jinja", ".py", ".safetensors", ".model")
STORE = "surgery_store"  # the key in the config of what is no model, but makes models
# Lists of the config that have one entry per layer, whatever the architecture.
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was checked: what came out, why, and each problem by itself."""

    name: str
    status: Literal["ok", "failed", "skipped"]
    detail: str
    problems: tuple[str, ...] = ()


class Skipped(Exception):
    """A check does not apply; the message says why."""


def unsound(error: SurgeryError) -> Check:
    """Return the failed check of a checkpoint that cannot even be opened."""
    return Check(name="headers", status="failed", detail="1 problem", problems=(str(error),))


def verify(
    checkpoint: Checkpoint,
    *,
    load: bool = True,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Check]:
    """Check an opened checkpoint in every way; its headers and index were checked to open it.

    Every byte is read once, in pieces; memory does not grow with the model.

    Args:
        load: ask transformers whether it would load the model whole.
        workers: threads.
        progress: called about ten times a second with bytes done and in all.

    Raises:
        StepError: a file cannot be read, or changes meanwhile.
    """
    files, size = len(checkpoint.files), checkpoint.nbytes / 1e6
    told = f"{files} file(s), {len(checkpoint.tensors)} tensors, {size:.1f} MB"
    checks = [Check(name="headers", status="ok", detail=told)]
    checks.append(_check("anatomy", lambda: _check_anatomy(checkpoint)))
    seen = read_values(checkpoint, workers=workers, progress=progress)
    checks.append(_check("values", lambda: _check_values(seen)))
    checks.append(_check("record", lambda: _check_record(checkpoint, seen.digests)))
    if load:
        checks.append(_check("loading", lambda: _check_loading(checkpoint)))
    else:
        checks.append(Check(name="loading", status="skipped", detail="not asked for (--no-load)"))
    return checks


def _check(name: str, examine: Callable[[], tuple[str, list[str]]]) -> Check:
    """Run one check: it returns what it looked at and the problems it found."""
    try:
        detail, problems = examine()
    except Skipped as reason:
        return Check(name=name, status="skipped", detail=str(reason))
    except SurgeryError as error:
        return Check(name=name, status="failed", detail="1 problem", problems=(str(error),))
    if not problems:
        return Check(name=name, status="ok", detail=detail)
    count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
    return Check(name=name, status="failed", detail=count, problems=tuple(problems))


def _check_anatomy(checkpoint: Checkpoint) -> tuple[str, list[str]]:
    if checkpoint.bare:
        raise Skipped("a bare file has no config to compare with")
    if isinstance(checkpoint, AdapterSource):
        raise Skipped("an adapter, which has no layers of its own")
    _skip_store(checkpoint)
    if checkpoint.config is None:
        return "", ["config.json: missing, so that nothing can load the weights"]
    parts = anatomy(checkpoint)
    text = dig(checkpoint.config, parts.section)
    problems = [
        *_wrong_lists(text, parts),
        *_wrong_vocabulary(checkpoint, text, parts),
        *(["config.json: promises an output head of its own, but there is none"] * parts.lost_head),
    ]
    return f"{parts.family}, {parts.layers} layers of {parts.stack.prefix}", problems


def _skip_store(checkpoint: Checkpoint) -> None:
    if STORE in (checkpoint.config or {}):
        raise Skipped("a store of task masks: `surgery emr task` makes models of it")


def _wrong_lists(text: Mapping[str, Any], parts: Anatomy) -> Iterable[str]:
    allowed = {parts.layers, parts.layers + parts.extra_layers}
    for key in PER_LAYER:
        value = text.get(key)
        if isinstance(value, list) and value and len(value) not in allowed:
            yield f"config.json: {key} has {len(value)} entries for {parts.layers} layers"


def _wrong_vocabulary(
    checkpoint: Checkpoint, text: Mapping[str, Any], parts: Anatomy
) -> Iterable[str]:
    told = text.get("vocab_size")
    for name in (parts.embedding, parts.head):
        rows = checkpoint.tensors[name].shape[0] if name else told
        if type(told) is int and rows != told:
            yield f"{name}: has {rows} rows, but the config has vocab_size = {told}"


@dataclass(slots=True)
class Values:
    """What one pass over all tensors found: numbers that are none, and digests, by name."""

    tensors: Mapping[str, Any]
    nonfinite: dict[str, int] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def write(self, name: str, at: int, view: memoryview) -> None:  # noqa: ARG002 - a Target
        """Look at a piece of a tensor; any thread, any order."""
        count = count_nonfinite(view, self.tensors[name].dtype)
        if count:
            with self.lock:
                self.nonfinite[name] = self.nonfinite.get(name, 0) + count

    def leave_open(self) -> None:
        """Hold nothing open."""

    def finish(self, line: Mapping[str, Any]) -> None:
        """Take the digest of a tensor that was read to its end."""
        with self.lock:
            self.digests.update(line["outputs"])


def read_values(
    checkpoint: Checkpoint, *, workers: int | None = None, progress: Progress | None = None
) -> Values:
    """Read every tensor once: count what is not finite, digest the bytes.

    Raises:
        StepError: a file cannot be read, or changes meanwhile.
    """
    steps = [
        Step(inputs=(tensor,), outputs=((name, TensorSpec(tensor.dtype, tensor.shape)),))
        for name, tensor in checkpoint.tensors.items()
    ]
    values = Values(checkpoint.tensors)
    allow_many_files()
    with Sources((checkpoint,)) as sources:
        engine = Engine(steps, sources, values, memory=MEMORY)
        engine.run(workers or default_workers(), progress)
        sources.check_unchanged()
    return values


def _check_values(values: Values) -> tuple[str, list[str]]:
    problems = [
        f"{name}: {values.nonfinite[name]} of {tensor.numel} values are NaN or infinite"
        for name, tensor in values.tensors.items()
        if name in values.nonfinite
    ]
    return "all finite", problems


def _check_record(checkpoint: Checkpoint, digests: Mapping[str, str]) -> tuple[str, list[str]]:
    record, text = read_record(checkpoint), record_text(checkpoint)
    if record is None or text is None:
        raise Skipped("there is no record of how it was made")
    sound = record.get("digest") == ALGORITHM and all(
        isinstance(record.get(key), dict) for key in ("outputs", "headers", "files")
    )
    if not sound:
        return "", [f"{RECORD}: is not a record that this version can compare with"]
    problems = (
        [] if is_sealed(text.rstrip("\n")) else [f"{RECORD}: was edited after it was written"]
    )
    problems += _differences(record["outputs"], digests)
    problems += _differences(record["headers"], _headers(checkpoint, text), "its header ")
    problems += _differences(record["files"], _files(checkpoint, record["files"]))
    problems += [
        f"{path.name}: left over, the record does not name it, and a loader would read it"
        for path in (() if checkpoint.bare else sorted(checkpoint.root.iterdir()))
        if path.suffix in READ_BY_LOADERS
        and path.name not in {*record["files"], *record["headers"], RECORD}
    ]
    told = f"{record.get('operation')}: {len(digests)} tensors"
    return f"{told}, {len(record['files'])} other files as recorded", problems


def _differences(
    told: Mapping[str, Any], found: Mapping[str, str], what: str = ""
) -> Iterable[str]:
    for name, digest in told.items():
        if name not in found:
            yield f"{name}: missing, the record names it"
        elif found[name] != digest:
            yield f"{name}: {what}differs from the record"
    yield from (f"{name}: not in the record" for name in found if name not in told)


def _headers(checkpoint: Checkpoint, text: str) -> dict[str, str]:
    own = text if checkpoint.bare else None
    names = ["model.safetensors"] if checkpoint.bare else [file.name for file in checkpoint.files]
    headers = map(_header_bytes, checkpoint.files)
    return {n: header_digest(raw, own) for n, raw in zip(names, headers, strict=True)}


def _header_bytes(file: Path) -> bytes:
    size = read_header(file).data_start
    with file.open("rb") as opened:
        return opened.read(size)


def _files(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, str]:
    """Digest the recorded files that are there; a name that leads out of the model is refused."""
    here = [name for name in names if (checkpoint.root / name).exists()]
    paths = {name: contained(checkpoint.root, name) for name in here}
    return {n: hashlib.sha256(read_small_file(path)).hexdigest() for n, path in paths.items()}


def _check_loading(checkpoint: Checkpoint) -> tuple[str, list[str]]:
    from surgery.loading import CannotTell, loading_problems

    _skip_store(checkpoint)
    try:
        problems = loading_problems(checkpoint)
    except CannotTell as reason:
        raise Skipped(str(reason)) from reason
    return "transformers loads it whole (built on the meta device)", problems
