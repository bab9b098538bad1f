"""A pipeline file: what it asks for, what is done, and how it is told."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from cli import render
from cli.report import remarks, totals
from cli.steps import as_task, read_steps
from cli.words import Step
from cli.writing import Writing, is_planning
from surgery.errors import PlanError, RecipeError
from surgery.pipeline import Folder, Outcome, Outlook, Task, carry_out, check_order, survey
from surgery.preflight import SLACK
from surgery.recipe.fields import check_keys
from surgery.recipe.reader import Document
from surgery.recipe.settings import Places

KEYS = ("steps", "output")
PLANNED = {"run": "run", "perhaps": "run?", "fresh": "skip", "removed": "skip"}


def is_pipeline(document: Document) -> bool:
    """Whether a document is a pipeline and no recipe."""
    return "steps" in document.value


def run_pipeline(document: Document, writing: Writing, *, only: str | None = None) -> None:
    """Carry out a pipeline, or tell what it would do, by the options.

    Raises:
        RecipeError: something in the file makes no sense; nothing was run.
    """
    if is_planning():
        fact = "is a pipeline, which is no step of another"
        raise RecipeError(document.source or "pipeline", fact, "copy its steps in")
    check_keys(document.value, KEYS, Places(document))
    steps = read_steps(document)
    check_order({s.name: s.uses for s in steps}, lambda name: document.place("steps", name))
    _check_keep(steps)
    defaults, folder = _defaults(writing), _folder(document, writing)
    for step in steps:
        if step.name == str(folder):
            fact = "has the name of the folder that the outputs go to"
            raise RecipeError(step.place(), fact, "rename the step, or give another folder with -o")
    tasks = [as_task(step, defaults, folder) for step in steps]
    run_tasks(tasks, folder, writing, only=only)


def run_tasks(
    tasks: Sequence[Task], path: Path, writing: Writing, *, only: str | None = None
) -> None:
    """Carry out tasks in a folder, or tell what would be done, by the options.

    Raises:
        RecipeError: `only` names none of them.
        PlanError: one cannot be planned; nothing was run.
    """
    folder = Folder(path, readonly=writing.dry_run)
    with folder:
        there = None
        if only is not None:
            tasks = [_chosen(tasks, only)]
            there = {n: made for n in tasks[0].uses if (made := folder.find(n))}
            _check_there(tasks[0], there)
        found = survey(tasks, folder, force=writing.force, there=there)
        if writing.dry_run:
            _show_survey(found, folder, as_json=writing.as_json)
            return
        _check_disk(found, folder)
        _run(found, folder, writing)


def _folder(document: Document, writing: Writing) -> Path:
    told = document.value.get("output")
    if told is not None and not isinstance(told, str):
        raise RecipeError(
            document.place("output"), "is no path", "write for instance output: build"
        )
    if not told and not document.source and not writing.output:
        raise RecipeError("pipeline", "has no folder for its outputs", "give -o")
    return writing.output or Path(told or Path(document.source).stem)


def _defaults(writing: Writing) -> list[str]:
    """Return the options of `surgery run` that hold for every step that writes.

    Raises:
        RecipeError: an option that a pipeline has no use for.
    """
    plain = Writing()
    if writing.weights is not None:
        raise RecipeError("--weights", "is for one checkpoint", "write it into the steps")
    given = {
        "--memory": writing.memory if writing.memory != plain.memory else None,
        "--shard-size": writing.shard_size if writing.shard_size != plain.shard_size else None,
        "--workers": writing.workers,
    }
    writing.limits()
    words = [f"{name}={value}" for name, value in given.items() if value is not None]
    return (
        words + ["--fresh"] * (not writing.resume) + ["--allow-download"] * writing.allow_download
    )


def _check_keep(steps: Sequence[Step]) -> None:
    used = {name for step in steps for name in step.uses}
    for step in steps:
        if not step.keep and step.name not in used:
            fact = "keep: false, but no step uses its output"
            raise RecipeError(step.place(), fact, "drop the step, or keep its output")


def _chosen(tasks: Sequence[Task], only: str) -> Task:
    for task in tasks:
        if task.name == only:
            return task
    names = ", ".join(task.name for task in tasks)
    raise RecipeError(f"--only {only}", "is no step of the pipeline", f"there are {names}")


def _check_there(task: Task, there: dict[str, Path]) -> None:
    for name in task.uses:
        if name not in there:
            fact = f"uses {name!r}, whose output is not there"
            raise PlanError(f"--only {task.name}", fact, "run the whole pipeline")


def _needs(found: Sequence[Outlook]) -> int:
    """Bytes of disk that a run takes at most: what is replaced goes only when the new is there."""
    writes = [one for one in found if one.state in ("run", "perhaps") and one.disk]
    kept = sum(max(one.disk + SLACK - one.replaces, 0) for one in writes)
    return kept + max((min(one.replaces, one.disk) for one in writes), default=0)


def _check_disk(found: Sequence[Outlook], folder: Folder) -> None:
    need, free = _needs(found), folder.free()
    if need > free and not any(not one.task.keep for one in found):
        fact = f"needs up to {render.size(need)} of disk, but {render.size(free)} are free"
        raise PlanError(folder.path, fact, "free some space, or choose another disk")


def _show_survey(found: Sequence[Outlook], folder: Folder, *, as_json: bool) -> None:
    need, free = _needs(found), folder.free()
    if as_json:
        steps = [
            {"step": o.task.name, "command": o.task.what, "state": o.state, "why": o.why}
            | {"uses": list(o.task.uses), "disk": o.disk if o.state in ("run", "perhaps") else 0}
            for o in found
        ]
        told = {"output": str(folder.path), "steps": steps, "disk_needed": need, "disk_free": free}
        render.print_json(told)
        return
    rows = [(o.task.name, o.task.what, PLANNED[o.state], o.why, _size(o)) for o in found]
    render.table(("step", "command", "plan", "why", "size"), rows, numbers=(4,))
    render.line(f"output  {folder.path}")
    render.line(f"disk    {render.size(need)} needed at most, {render.size(free)} free")
    render.line("nothing was written (--dry-run)", "dim")


def _size(one: Outlook) -> str:
    return render.size(one.disk) if one.state in ("run", "perhaps") and one.disk else ""


def _run(found: Sequence[Outlook], folder: Folder, writing: Writing) -> None:
    def drawn(name: str) -> AbstractContextManager[Any]:
        return render.progress(name)

    done: list[Outcome] = []
    for outcome in carry_out(found, folder, force=writing.force, progress=drawn):
        done.append(outcome)
        if not writing.as_json:
            remarks(outcome.notes, outcome.told, of=f"{outcome.task.name}: ")
            totals(outcome.total)
            render.line(_told(outcome, max(len(one.task.name) for one in found)))
    if writing.as_json:
        render.print_json({"output": str(folder.path), "steps": [_as_dict(one) for one in done]})


def _told(one: Outcome, width: int) -> str:
    name = one.task.name.ljust(width)
    if one.state in ("skipped", "removed"):
        return f"{name}  skipped   {one.why}"
    took = f"in {one.seconds:.1f} s"
    if one.state == "measured":
        return f"{name}  measured  {one.output} {took} ({one.why})"
    kept = f", {one.reused} plan steps kept" if one.reused else ""
    return f"{name}  made      {one.output}, {render.size(one.bytes_out)} {took}{kept} ({one.why})"


def _as_dict(one: Outcome) -> dict[str, Any]:
    return {
        "step": one.task.name,
        "command": one.task.what,
        "state": one.state,
        "why": one.why,
        "output": str(one.output),
        "seconds": round(one.seconds, 3),
        "bytes_written": one.bytes_out,
        "steps_resumed": one.reused,
        "told": one.told,
        **one.total,
        "notes": list(one.notes),
    }
