"""Look ahead over a pipeline, then carry it out step by step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from time import perf_counter

from surgery.disk import io_errors
from surgery.engine import Progress
from surgery.errors import PlanError, SurgeryError
from surgery.pipeline.folder import Folder
from surgery.pipeline.graph import users
from surgery.pipeline.judgement import Verdict, judge
from surgery.pipeline.measurement import is_answered, keep_result, question, result_file
from surgery.pipeline.standin import write_standin
from surgery.pipeline.task import Outcome, Outlook, Paths, Planned, Task, looking_ahead
from surgery.run import layout_of
from surgery.write import clear_leftovers

RUNS = ("run", "perhaps")
Drawn = Callable[[str], AbstractContextManager[Progress | None]]


def survey(
    tasks: Sequence[Task],
    folder: Folder,
    *,
    force: bool = False,
    there: Mapping[str, Path] | None = None,
) -> list[Outlook]:
    """Plan every step without running any, and tell what is to be done.

    Steps whose inputs are not made yet are planned on stand-ins, so that what a plan refuses
    shows before anything runs.

    Args:
        tasks: in an order that `check_order` has passed.
        force: make everything anew.
        there: outputs of steps that are done and not among the tasks.

    Raises:
        SurgeryError: a step cannot be planned; the place names it.
    """
    with _scratch() as scratch, looking_ahead():
        ahead = _Ahead(folder, scratch, there or {}, force=force)
        for task in tasks:
            with _told(task):
                ahead.look(task)
    folder.save()
    return _needed(list(ahead.found.values()))


@contextmanager
def _scratch() -> Iterator[Path]:
    """Give a temporary folder for stand-ins."""
    with ExitStack() as stack:
        try:
            made = TemporaryDirectory(prefix="surgery-", ignore_cleanup_errors=True)
            path = stack.enter_context(made)
        except OSError as error:
            fact = f"cannot be written ({error.strerror})"
            raise PlanError(gettempdir(), fact, "set TMPDIR to a folder that can") from error
        yield Path(path)


class _Ahead:
    """What is known of the steps looked at so far.

    Attributes:
        found: by name.
        paths: where the output of each is, or its stand-in.
        moved: the latter to where the output will be.
    """

    def __init__(self, folder: Folder, scratch: Path, there: Paths, *, force: bool) -> None:
        self.folder, self.scratch, self.force = folder, scratch, force
        self.found: dict[str, Outlook] = {}
        self.paths = dict(there)
        self.moved: dict[str, str] = {}

    def look(self, task: Task) -> None:
        used = {name: self.paths[name] for name in task.uses}
        remade = [n for n in task.uses if n in self.found and self.found[n].state in RUNS]
        waits = f"depends on how {' and '.join(remade)} comes out"
        if task.plan is None:
            state, why = self._judge_result(task, used, waits if remade else "")
            self.found[task.name] = Outlook(task=task, state=state, why=why)
            return
        planned = task.plan(used)
        state, why = "run", "asked for (--force)"
        if not self.force:
            state, why = judge(self.folder, task.name, planned, moved=self.moved)
        self._stand_in(task.name, planned, state)
        old = self.folder.find(task.name)
        self.found[task.name] = Outlook(
            task=task,
            state=state,
            why=waits if state == "perhaps" else why,
            disk=layout_of(planned.plan, planned.shard_size).size,
            replaces=_size(old) if old else 0,
        )

    def _judge_result(self, task: Task, used: Paths, waits: str) -> Verdict:
        if self.force:
            return "run", "asked for (--force)"
        if not result_file(self.folder, task.name).exists():
            return "run", "it is not there"
        if waits:
            return "perhaps", waits
        if is_answered(self.folder, task.name, question(task.what, task.asked, used)):
            return "fresh", "nothing changed"
        return "run", "what it measures, or how, changed"

    def _stand_in(self, name: str, planned: Planned, state: str) -> None:
        """See to it that later steps can be planned on the output."""
        place = self.folder.place(name, bare=planned.plan.bare)
        stored = self.folder.stored(name) if state == "removed" else None
        path = place if state == "fresh" else self.scratch / place.name
        if stored is not None:
            path = stored.absolute()
            self.folder.promise(_weights(path), name)
        elif state != "fresh":
            with io_errors(path):
                self.folder.promise(write_standin(planned, path))
        self.paths[name] = path
        self.moved[str(path)] = str(place)


def _needed(found: Sequence[Outlook]) -> list[Outlook]:
    """Make removed outputs again where a step that runs takes them."""
    uses = {one.task.name: one.task.uses for one in found}
    states = {one.task.name: one for one in found}
    for one in reversed(found):
        asking = [n for n in users(uses, one.task.name) if states[n].state in RUNS]
        if one.state == "removed" and asking:
            why = f"it was removed after use, and {asking[0]} needs it"
            states[one.task.name] = replace(one, state="run", why=why)
    return list(states.values())


def carry_out(
    found: Sequence[Outlook],
    folder: Folder,
    *,
    force: bool = False,
    progress: Drawn = lambda _: nullcontext(),
) -> Iterator[Outcome]:
    """Run what is to be run, in order, and tell what was done for each step.

    Args:
        found: by `survey`.
        progress: given a step's name, draws its progress.

    Raises:
        SurgeryError: a step failed; the place names it. Finished steps stay.
    """
    for at, one in enumerate(found):
        with _told(one.task):
            if one.state in {"fresh", "removed"}:
                yield _skipped(one, folder)
            elif one.task.plan is not None:
                yield _make(one, folder, force=force, progress=progress)
            else:
                yield _measure(one, folder, force=force)
        _clear(found, at, folder)


def outputs_of(task: Task, folder: Folder) -> dict[str, Path]:
    """Return where the outputs are that a step uses.

    Raises:
        PlanError: one is not there.
    """
    found = {name: folder.find(name) for name in task.uses}
    for name, path in found.items():
        if path is None:
            fact = f"needs the output of {name!r}, which is not there"
            raise PlanError(task.name, fact, "run the whole pipeline")
    return {name: path for name, path in found.items() if path is not None}


def _make(one: Outlook, folder: Folder, *, force: bool, progress: Drawn) -> Outcome:
    task = one.task
    assert task.plan is not None  # noqa: S101 - told by the caller
    planned = task.plan(outputs_of(task, folder))
    place = folder.place(task.name, bare=planned.plan.bare)
    if not force:
        state, why = judge(folder, task.name, planned)
        if state == "fresh":
            why = f"{why}: its inputs came out as before"
            return Outcome(task=task, state="skipped", why=why, output=place)
    began = perf_counter()
    with progress(task.name) as drawn:
        report = folder.make(task.name, planned, force=force, progress=drawn)
    told = report.record.get("told", {})
    return Outcome(
        task=task,
        state="made",
        why=one.why,
        output=place,
        seconds=perf_counter() - began,
        bytes_out=planned.plan.bytes_out,
        reused=report.reused,
        notes=tuple(planned.plan.notes),
        told=told,
        total=planned.in_all(told),
    )


def _measure(one: Outlook, folder: Folder, *, force: bool) -> Outcome:
    task = one.task
    assert task.measure is not None  # noqa: S101 - told by the caller
    used = outputs_of(task, folder)
    asked = question(task.what, task.asked, used)
    path = result_file(folder, task.name)
    if not force and is_answered(folder, task.name, asked):
        why = "nothing changed: its inputs came out as before"
        return Outcome(task=task, state="skipped", why=why, output=path)
    began = perf_counter()
    keep_result(folder, task.name, asked, task.measure(used))
    took = perf_counter() - began
    return Outcome(task=task, state="measured", why=one.why, output=path, seconds=took)


def _skipped(one: Outlook, folder: Folder) -> Outcome:
    task = one.task
    path = folder.find(task.name) or folder.path_of_removed(task.name)
    if task.plan is None:
        path = result_file(folder, task.name)
    else:
        clear_leftovers(path)
    removed = one.state == "removed"
    return Outcome(task=task, state="removed" if removed else "skipped", why=one.why, output=path)


def _clear(found: Sequence[Outlook], at: int, folder: Folder) -> None:
    """Remove what need not be kept once its last user is done."""
    uses = {one.task.name: one.task.uses for one in found}
    done = {one.task.name for one in found[: at + 1]}
    for one in found[:at]:
        asking = users(uses, one.task.name)
        if not one.task.keep and asking and done.issuperset(asking):
            folder.remove(one.task.name)


@contextmanager
def _told(task: Task) -> Iterator[None]:
    """Name the step in errors."""
    try:
        yield
    except SurgeryError as error:
        place = f"step {task.name!r}, {error.place}"
        raise type(error)(place, error.fact, error.remedy) from error


def _weights(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)
