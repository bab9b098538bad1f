"""What every command that writes a checkpoint shares: its options, its dry run, its report."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import render
from cli.report import WARNING, InAll, remarks, totals
from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.errors import RecipeError
from surgery.plan import Plan

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

# Who gets the plans of commands instead of running them, the limits to run them by, and what
# makes figures of the whole.
Taker = Callable[[Plan, Mapping[str, Any], InAll], None]
_taker: ContextVar[Taker | None] = ContextVar("taker", default=None)
_outputs: ContextVar[Mapping[str, Path]] = ContextVar("outputs")  # what names of steps stand for

BASE = Annotated[
    str, typer.Argument(metavar="BASE", help="A directory, a .safetensors file, or org/name[@rev].")
]


@contextmanager
def plans_taken_by(taker: Taker, *, outputs: Mapping[str, Path]) -> Iterator[None]:
    """Let commands that are called in here give their plans away: a pipeline runs them itself.

    Args:
        outputs: where what is called by the name of a step lies.
    """
    tokens = _taker.set(taker), _outputs.set(outputs)
    try:
        yield
    finally:
        _taker.reset(tokens[0])
        _outputs.reset(tokens[1])


def resolved(text: str, outputs: Mapping[str, Path]) -> str:
    """Replace the name of a step: alone, behind `NAME=`, beside `+`, or before a `/`."""
    if text in outputs:
        return str(outputs[text])
    left, equals, right = text.partition("=")
    if equals:
        return f"{left}={resolved(right, outputs)}"
    if "+" in text:
        return "+".join(resolved(part, outputs) for part in text.split("+"))
    first, slash, rest = text.partition("/")
    return f"{outputs[first]}/{rest}" if slash and first in outputs else text


def is_planning() -> bool:
    """Whether somebody else takes the plan of the command that runs."""
    return _taker.get() is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """The options that every writing command has; their annotations are the command line's."""

    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Where to write.  [default: beside the first input]"),
    ] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")] = (
        False
    )
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False
    force: Annotated[
        bool, typer.Option("--force", help="Replace a model that stands at the output.")
    ] = False
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on with an interrupted run, or start anew.")
    ] = True
    workers: Annotated[
        int | None, typer.Option(min=1, max=256, help="Threads.  [default: by cores]")
    ] = None
    memory: Annotated[str, typer.Option(help="Memory to hold at most, such as 512M or 4G.")] = "1G"
    shard_size: Annotated[
        str, typer.Option(help="Tensor bytes per output file, such as 500MB or 5GB.")
    ] = "5GB"
    weights: Annotated[
        str | None, typer.Option(help="The weight or index file to take, where there are several.")
    ] = None
    allow_download: Annotated[
        bool, typer.Option("--allow-download", help="Fetch a hub model that is not in the cache.")
    ] = False

    def limits(self) -> dict[str, Any]:
        """Return the limits of a run, parsed."""
        return {
            "memory": parse_size(self.memory, "--memory"),
            "shard_size": parse_size(self.shard_size, "--shard-size"),
            "workers": self.workers,
        }

    def open(self, ref: str) -> Checkpoint:
        """Open a source by the options that say how; of a pipeline, a step by its name."""
        outputs = _outputs.get({})
        place = "+".join(str(outputs.get(part, part)) for part in ref.split("+"))
        return open_checkpoint(place, weights=self.weights, allow_download=self.allow_download)

    def check_output(self, plan: Plan, out: Path) -> None:
        """Refuse an output that cannot be written, before what takes long is measured for it."""
        if not is_planning():  # a pipeline looks after its outputs itself
            from surgery.preflight import check_output

            check_output(plan, out, force=self.force)


def writing_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes `writing: Writing` each of its fields as an option."""
    shared = signature(Writing).parameters
    own = [p for name, p in signature(command).parameters.items() if name != "writing"]

    @wraps(command)
    def wrapper(**given: Any) -> None:  # noqa: ANN401 - whatever the command line holds
        writing = Writing(**{name: given.pop(name) for name in shared})
        command(**given, writing=writing)

    joined = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in (*own, *shared.values())]
    wrapper.__signature__ = Signature(joined)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in joined}
    return wrapper


def parse_size(text: str, option: str) -> int:
    """Parse `512M`, `4G` or `5GB` (GB and MB are powers of 1000).

    Raises:
        RecipeError: not of that form, or below one mebibyte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise RecipeError(f"{option} {text}", "is not a size", "write for instance 512M or 5GB")
    number, unit, suffix = float(match[1]), match[2].upper(), (match[3] or "").lower()
    base = 1000 ** ("KMGT".index(unit) + 1) if suffix == "b" and unit else UNITS[unit]
    if number * base < 1 << 20:
        raise RecipeError(f"{option} {text}", "is below one mebibyte", "write for instance 512M")
    return int(number * base)


def make(
    base: str, compile_plan: Callable[[Checkpoint], Plan], *, suffix: str, writing: Writing
) -> None:
    """Open, plan, and either describe or run; the body of every command that writes.

    Args:
        suffix: what the default output's name gets behind the base's.
    """
    writing.limits()  # an error in them is told before anything is opened
    source = writing.open(base)
    plan = compile_plan(source)
    write_plan(plan, writing.output or default_output(source, suffix), writing)


def write_plan(plan: Plan, out: Path, writing: Writing, *, in_all: InAll = lambda _: {}) -> None:
    """Describe a plan, or run it, by the options; every command that writes ends here.

    Args:
        in_all: makes of what the steps told figures of the whole, to be printed.
    """
    limits = writing.limits()
    taker = _taker.get()
    if taker is not None:
        taker(plan, {**limits, "fresh": not writing.resume}, in_all)
        return
    if writing.dry_run:
        from surgery.describe import describe
        from surgery.preflight import preflight

        told = describe(plan, out, preflight(plan, out, force=writing.force, **limits))
        render.print_json(told) if writing.as_json else _show_plan(told)
        return
    options = {"force": writing.force, "fresh": not writing.resume, **limits}
    carry_out(plan, out, as_json=writing.as_json, in_all=in_all, **options)


def carry_out(
    plan: Plan,
    out: Path,
    *,
    as_json: bool,
    in_all: InAll = lambda _: {},
    **options: Any,  # noqa: ANN401 - those of `run`
) -> None:
    """Run a plan under a progress bar and print the report."""
    from surgery.run import run

    with render.progress(f"{plan.operation} {out.name}") as progress:
        report = run(plan, out, progress=progress, **options)
    total = in_all(report.record.get("told", {}))
    if as_json:
        render.print_json(
            {
                "output": str(out),
                "operation": plan.operation,
                "tensors": len(plan.order),
                "bytes_read": report.bytes_in,
                "bytes_written": report.bytes_out,
                "steps": len(plan.steps),
                "steps_resumed": report.reused,
                "seconds": round(report.seconds, 3),
                "facts": dict(plan.facts),
                "told": report.record.get("told", {}),
                **total,
                "notes": list(plan.notes),
            }
        )
        return
    resumed = f", {report.reused} of {len(plan.steps)} steps kept" if report.reused else ""
    remarks(plan.notes, report.record.get("told", {}))
    totals(total)
    written = render.size(plan.bytes_out)
    render.line(f"{out}  {len(plan.order)} tensors, {written} in {report.seconds:.1f} s{resumed}")


def default_output(source: Checkpoint, suffix: str) -> Path:
    """Return the output beside the source: `base-stack2`, with .safetensors for a bare file."""
    folder = Path() if source.revision else source.root if source.bare else source.root.parent
    return folder / (f"{source.name}-{suffix}" + (".safetensors" if source.bare else ""))


def _show_plan(told: dict[str, Any]) -> None:
    rows = [
        (why, group["steps"], render.size(group["bytes_in"]), render.size(group["bytes_out"]))
        for why, group in told["work"].items()
    ]
    render.table(("work", "steps", "read", "write"), rows, numbers=(1, 2, 3))
    disk, free = render.size(told["disk_needed"]), render.size(told["disk_free"])
    render.line(f"output  {told['output']}: {told['tensors']} tensors in {told['shards']} file(s)")
    if told["layer_map"]:
        render.line(f"layers  {told['layer_map']}")
    torch = ", beside torch itself (about 200 MB)" if told["computes"] else ""
    render.line(f"memory  {render.size(told['peak_memory'])} of buffers at most{torch}")
    render.line(f"disk    {disk} needed, {free} free")
    for name, count in told["dropped"].items():
        render.line(f"drops   {count} tensors: {name}")
    for note in told["notes"]:
        warns = note.startswith(WARNING)
        render.line(f"warning {note.removeprefix(WARNING)}" if warns else f"note    {note}")
    render.line("nothing was written (--dry-run)", "dim")
