"""Run a plan: check, write, record, publish. The one way to make a checkpoint."""

import hashlib
import json
import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from surgery.checkpoint.jsonfile import read_small_file
from surgery.digest import LEAF, PLACEHOLDER, Digests, combine, leaf_digests
from surgery.engine import Engine, Progress
from surgery.errors import Interrupted, ResultError
from surgery.items import DigestOnly
from surgery.plan import Plan, check_plan, fingerprint
from surgery.preflight import MEMORY, check_output, fitting_workers, peak_memory, preflight
from surgery.provenance import (
    KEY,
    RECORD,
    header_digest,
    make_record,
    model_card,
    sealed,
    tool_version,
)
from surgery.shards import SHARD_SIZE, Layout, lay_out, make_header
from surgery.slices import Scratch, Sources, pieces
from surgery.write import Partial

LONGEST_NUMBER = -1.7976931348623157e308  # in the record's text


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a run did.

    Attributes:
        out: the output directory or file.
        bytes_in, bytes_out: tensor bytes read and written, those of resumed steps left out.
        reused: steps that an interrupted run had finished.
        seconds: wall time, everything on disk included.
        record: what went into `surgery.json`.
        digests: of every tensor read and written, those of resumed steps too.
    """

    out: Path
    bytes_in: int
    bytes_out: int
    reused: int
    seconds: float
    record: Mapping[str, Any]
    digests: Digests


def run(
    plan: Plan,
    out: str | Path,
    *,
    workers: int | None = None,
    memory: int = MEMORY,
    shard_size: int = SHARD_SIZE,
    force: bool = False,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Carry out a plan and leave a complete checkpoint at `out`, or nothing.

    What an interrupted run of the same plan has finished is checked and kept.

    Args:
        plan: from any operation.
        out: a directory that does not exist or is empty; a .safetensors file for a bare plan.
        workers: threads; the result does not depend on them.
        memory: bytes of buffers and whole tensors to hold at once.
        shard_size: bytes of tensor data per file of a directory.
        force: replace a model that stands at `out`, in one step at the end.
        fresh: do not go on with what an interrupted run left.
        progress: called about ten times a second with bytes done and in all.

    Raises:
        PlanError: the run cannot succeed here; nothing was touched.
        StepError: something failed midway; what is finished is kept for a resume.
        Interrupted: Ctrl-C or SIGTERM; likewise.
    """
    began = perf_counter()
    out = Path(out)
    check_plan(plan)
    threads = fitting_workers(plan, workers=workers, memory=memory)
    preflight(plan, out, force=force, memory=memory, workers=threads, shard_size=shard_size)
    allow_many_files()
    layout = layout_of(plan, shard_size)
    opened = (plan.reader or Sources)(plan.sources)
    with opened as sources, Partial(out, layout, bare=plan.bare) as partial:
        check_output(plan, out, force=force)  # again, now that nobody else can write there
        lines = partial.begin(f"{tool_version()} {fingerprint(plan, shard_size)}", fresh=fresh)
        try:
            finished = _still_sound(plan, partial, lines)
            kept = {n for n, s in enumerate(plan.steps) if s.outputs[0][0] in finished.outputs}
            engine = Engine(plan.steps, sources, partial, memory=memory, finished=kept)
            digests = _joined(finished, engine.run(threads, progress))
            sources.check_unchanged()
            record = _complete(plan, partial, layout, digests)
            partial.publish(replace=force)
        except ResultError:
            partial.abandon()
            raise
        except KeyboardInterrupt as stop:
            if partial.published:
                raise
            remedy = "run the same command again to go on where it stopped"
            raise Interrupted(out, "interrupted; what is finished is kept", remedy) from stop
    todo = [step for number, step in enumerate(plan.steps) if number not in kept]
    return Report(
        out=out,
        bytes_in=sum(step.bytes_in for step in todo),
        bytes_out=sum(step.bytes_out for step in todo),
        reused=len(kept),
        seconds=perf_counter() - began,
        record=record,
        digests=digests,
    )


def dry_digests(
    plan: Plan,
    *,
    workers: int | None = None,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> Mapping[str, Any]:
    """Carry out a plan without writing anything, and return the record it would leave.

    Raises:
        PlanError: one step alone needs more than the budget.
    """
    threads = fitting_workers(plan, workers=workers, memory=memory)
    peak_memory(plan, workers=threads, memory=memory)
    allow_many_files()
    with (plan.reader or Sources)(plan.sources) as sources:
        engine = Engine(check_plan(plan).steps, sources, DigestOnly(), memory=memory)
        digests = engine.run(threads, progress)
        sources.check_unchanged()
    files = {name: hashlib.sha256(data).hexdigest() for name, data in beside(plan)}
    return make_record(plan, digests, files=files)


def planned_record(
    plan: Plan, *, shard_size: int = SHARD_SIZE, inputs: Mapping[str, str] | None = None
) -> Mapping[str, Any]:
    """Return the record that a run would leave, with placeholders where only a run can tell.

    Args:
        inputs: digests of what is read, `file:tensor` as `Digests` names it, where known.
    """
    layout = layout_of(plan, shard_size)
    own = _bare_record(plan, Digests(), _no_headers(plan)) if plan.bare else None
    headers = {shard.name: header_digest(shard.header, own) for shard in layout.shards}
    files = {name: hashlib.sha256(data).hexdigest() for name, data in beside(plan, layout)}
    size = None if plan.bare else shard_size
    digests = Digests(inputs=dict(inputs or {}))
    return make_record(plan, digests, headers=headers, files=files, shard_size=size)


def layout_of(plan: Plan, shard_size: int) -> Layout:
    """Return where every tensor of the output goes."""
    if not plan.bare:
        size = plan.bytes_out + 1 if plan.one_file else shard_size
        return lay_out(plan.outputs, shard_size=size, stem=plan.stem)
    metadata = {KEY: _bare_record(plan, Digests(), _no_headers(plan))}
    return lay_out(plan.outputs, shard_size=plan.bytes_out + 1, metadata=metadata)


def _no_headers(plan: Plan) -> dict[str, str]:
    """Stand in for the digest of a bare file's header, which holds the record itself."""
    return {"model.safetensors": PLACEHOLDER} if plan.bare else {}


def _bare_record(plan: Plan, digests: Digests, headers: Mapping[str, str]) -> str:
    """Write the record of a bare file, as long in its header whatever the steps tell."""
    record = make_record(plan, digests, headers=headers)
    telling = [step for step in plan.steps if step.tells]
    longest = {n: dict.fromkeys(s.tells, LONGEST_NUMBER) for s in telling for n, _ in s.outputs}
    if not longest:
        return sealed(record)
    most = sealed(make_record(plan, Digests(told=longest), headers=headers))
    return sealed(record, room=len(json.dumps(most)) - len(json.dumps(sealed(record))))


def _still_sound(plan: Plan, partial: Partial, lines: Sequence[Mapping[str, Any]]) -> Digests:
    """Return the digests of finished steps whose bytes are on disk as the journal says.

    After a kill they always are; after a power cut or a change from outside they may not be.
    """
    specs = plan.outputs
    scratch = Scratch()
    found = Digests()
    for line in lines:
        outputs = line["outputs"]
        if all(_read_digest(partial, n, specs[n].nbytes, scratch) == outputs[n] for n in outputs):
            found.add(line)
    return found


def _read_digest(partial: Partial, name: str, size: int, scratch: Scratch) -> str:
    leaves = []
    for start, count in pieces(size):
        view = scratch.take(0, count)
        partial.read(name, start, view)
        leaves += leaf_digests(view)
    assert size == 0 or len(leaves) == -(-size // LEAF)  # noqa: S101
    return combine(leaves)


def _joined(first: Digests, second: Digests) -> Digests:
    joined = Digests(dict(first.outputs), dict(first.inputs), dict(first.told))
    joined.outputs.update(second.outputs)
    joined.inputs.update(second.inputs)
    joined.told.update(second.told)
    return joined


def _complete(plan: Plan, partial: Partial, layout: Layout, digests: Digests) -> Mapping[str, Any]:
    """Write everything beside the tensors, and return the record."""
    if plan.bare:
        return _complete_bare(plan, partial, layout, digests)
    files: dict[str, str] = {}
    for name, data in beside(plan, layout):
        partial.add(name, data)
        files[name] = hashlib.sha256(data).hexdigest()
    headers = {shard.name: header_digest(shard.header) for shard in layout.shards}
    record = make_record(plan, digests, headers=headers, files=files, shard_size=layout.shard_size)
    text = sealed(record, indent=2)
    partial.add(RECORD, text.encode() + b"\n")
    return _parsed(text)


def _complete_bare(
    plan: Plan, partial: Partial, layout: Layout, digests: Digests
) -> Mapping[str, Any]:
    shard = layout.shards[0]
    specs = {name: plan.outputs[name] for name in shard.tensors}
    text = _bare_record(plan, digests, _no_headers(plan))
    digest = header_digest(make_header(specs, {KEY: text})[0], text)
    text = _bare_record(plan, digests, {shard.name: digest})
    header, _ = make_header(specs, {KEY: text})
    assert len(header) == len(shard.header)  # noqa: S101 - placeholders have full length
    partial.reheader(0, header)
    return _parsed(text)


def _parsed(text: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(text)
    return found


def beside(plan: Plan, layout: Layout | None = None) -> Iterator[tuple[str, bytes]]:
    """Yield the files that stand beside the shards, one in memory at a time."""
    if plan.bare:
        return
    index = layout.index(plan.outputs) if layout else None
    if index is not None:
        yield "model.safetensors.index.json", _pretty(index)
    yield plan.config_name, _pretty(plan.config)
    for path in plan.carried:
        name = str(path.relative_to(plan.sources[0].root))
        if name not in plan.written:
            yield name, read_small_file(path)
    yield from plan.written.items()
    yield "README.md", model_card(plan).encode()


def _pretty(document: object) -> bytes:
    return json.dumps(document, indent=2, ensure_ascii=False, default=str).encode() + b"\n"


def allow_many_files() -> None:
    """A model of many shards needs two descriptors each."""
    with suppress(ValueError, OSError):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 1 << 16)), hard))
