"""A recovery from beginning to end: train, export, write the healed model, check it."""

import gc
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import open_checkpoint
from surgery.disk import io_errors
from surgery.errors import TrainError
from surgery.evaluate.load import find_dtype, open_source
from surgery.recover.ask import Ask, check_ask
from surgery.recover.batch import Batch
from surgery.recover.correction import correct, correction
from surgery.recover.data import Rows
from surgery.recover.distributed import World, joined, put_away
from surgery.recover.figures import Curve, finite
from surgery.recover.goal import CE, Goal, OnLogits
from surgery.recover.heads import Head, head_of, states_of
from surgery.recover.interrupts import listening
from surgery.recover.logs import logging
from surgery.recover.loop import Loop, Progress, Remark
from surgery.recover.output import healed, keep_adapter, open_trained
from surgery.recover.selected import handed_on
from surgery.recover.session import Session, computing, opened
from surgery.recover.spread import load_shared
from surgery.run import run

if TYPE_CHECKING:
    import torch

CHECKED_ROWS = 2  # of the data, whose loss is compared before and after writing
SLACK = 0.02  # nats a token that rounding to the student's dtype may cost, and 2% of the loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """What came out.

    Attributes:
        out: the healed model; None where the run was asked to stop before its end.
        adapter: LoRA's adapter, where it was kept.
        curve: the run.
        told: what the record holds of it.
        first: this is the process that writes and tells.
    """

    first: bool
    out: Path | None
    adapter: Path | None
    curve: Curve
    told: Mapping[str, Any]


def recover(
    ask: Ask,
    *,
    force: bool = False,
    progress: Progress | None = None,
    remark: Remark | None = None,
    **limits: Any,  # noqa: ANN401 - those of `run`
) -> Recovery:
    """Heal a model: train it on text, alone or with its parent as the teacher.

    Under torchrun every process calls it; the first one writes and tells.

    Args:
        force: replace a model that stands at the output.
        progress: called with every step's figures.
        remark: called with what the user should know of checkpoints that are not as they should.
        limits: memory, shard_size, workers of the writing.

    Raises:
        RecipeError, CheckpointError: something does not fit; nothing has been trained.
        TrainError: a model does not load whole, the loss is out of bounds and stays so, or what
            was written does not compute what was trained.
    """
    check_ask(ask, force=force)
    return heal(ask, RECOVERY, force=force, progress=progress, remark=remark, **limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a run is for.

    Attributes:
        goal: what it brings down.
        prepare: see `opened`.
        mode: what the record calls it; None for what is trained.
    """

    goal: Callable[[Session], Goal]
    prepare: "Callable[[torch.nn.Module], None] | None" = None
    mode: str | None = None


RECOVERY = Kind(goal=OnLogits)


def heal(
    ask: Ask,
    kind: Kind,
    *,
    force: bool,
    progress: Progress | None,
    remark: Remark | None,
    **limits: Any,  # noqa: ANN401 - those of `run`
) -> Recovery:
    """Train, write and check; for an ask that was checked.

    Raises:
        RecipeError, CheckpointError, TrainError: as `recover`.
    """
    limits |= {"force": force, "remark": remark}
    with joined(ask.device) as world:
        if ask.settings.correct_teacher:
            lesson = correction(ask)
            again = {**limits, "force": True}  # a teacher of another ask may stand there
            found = correct(lesson, world, lambda: _heal(lesson, RECOVERY, world, None, **again))
            if found is not None:
                return found
            ask = replace(ask, teacher=str(lesson.out))
        return _heal(ask, kind, world, progress, **limits)


def _heal(
    ask: Ask,
    kind: Kind,
    world: World,
    progress: Progress | None,
    *,
    force: bool,
    remark: Remark | None,
    **limits: Any,  # noqa: ANN401 - those of `run`
) -> Recovery:
    # Afterwards signals stop at once: writing can be done again.
    with listening() as asked, _logged(ask, world, progress) as told_to:

        def make(session: Session) -> Loop:
            return Loop(session, asked, told_to, remark, kind.goal(session))

        done = _train(ask, world, make, kind)
    gc.collect()  # what trained makes room for what is written and loaded again
    adapter, first = None, world.is_first
    if done.curve.stopped:
        return Recovery(first=first, out=None, adapter=None, curve=done.curve, told=done.told)
    if world.is_first:
        write(ask, done.told, mode=kind.mode, force=force, **limits)
    world.wait()
    _check_written(ask, world, done)
    if world.is_first:
        adapter = keep_adapter(ask.folder / "trained", ask.out) if ask.keep_adapter else None
    world.wait()
    return Recovery(first=first, out=ask.out, adapter=adapter, curve=done.curve, told=done.told)


@contextmanager
def _logged(ask: Ask, world: World, progress: Progress | None) -> Iterator[Progress | None]:
    """Let the logs that were asked for have every step's figures too."""
    if not ask.logs or not world.is_first:
        yield progress
        return
    table = ask.settings.as_dict()
    with logging(ask.logs, ask.folder, table, resume=ask.resume) as add:

        def tell(told: Mapping[str, Any]) -> None:
            add(told)
            if progress:
                progress(told)

        yield tell


@dataclass(frozen=True, slots=True, kw_only=True)
class _Done:
    """What training leaves: the curve, what is told of it, and how the trained model does."""

    curve: Curve
    told: Mapping[str, Any]
    rows: Rows
    half: bool
    cost: float


def _train(ask: Ask, world: World, make: Callable[[Session], Loop], kind: Kind) -> _Done:
    with opened(ask, world, prepare=kind.prepare) as session:
        loop = make(session)
        curve = loop.run()
        rows, half, cost = session.rows, session.half_precision, 0.0
        if not curve.stopped:
            export(session, ask.folder / "trained")
            model = session.loaded.model
            assert session.head is not None  # noqa: S101 - whole models have one
            cost = _cost(model, session.head, world, rows, half=half)
        return _Done(curve=curve, told=told_of(loop), rows=rows, half=half, cost=cost)


def export(session: Session, folder: Path) -> None:
    """Write what was trained in place of what an earlier run has left there."""
    first = session.world.is_first
    with io_errors(folder):
        if first and folder.is_dir():
            shutil.rmtree(folder)
        session.trainable.export(folder, write=first)


def told_of(loop: Loop) -> dict[str, Any]:
    """Return what the record holds of a run."""
    session, curve = loop.session, loop.curve
    ask = session.ask
    held_out = None
    if curve.before is not None:
        held_out = {"before": curve.before, "after": curve.after}
    trainable = session.trainable
    return {
        "settings": ask.settings.as_dict(),
        "parameters_trained": trainable.count,
        "teacher": ask.teacher or (str(ask.cache) if ask.cache else None),
        "data": session.rows.summary(),
        "selection": session.selection and session.selection.as_dict(),
        "steps": curve.step,
        "tokens": curve.tokens,
        "steps_skipped": curve.skipped,
        "losses": _thinned(curve.losses),
        "held_out": held_out,
        "processes": session.world.size,
        "speed": loop.meter.mean(),
        **({"kernels": dict(loop.kernels)} if loop.kernels else {}),
        **loop.goal.told(),
    }


def _thinned(losses: list[float], most: int = 200) -> list[list[Any]]:
    """Return at most so many [step, loss] of a curve; None for a loss that is not finite."""
    every = max(-(-len(losses) // most), 1)
    return [[step, finite(losses[step])] for step in range(0, len(losses), every)]


def write(
    ask: Ask,
    told: Mapping[str, Any],
    *,
    mode: str | None,
    force: bool,
    **limits: Any,  # noqa: ANN401 - those of `run`
) -> None:
    """Write the student with what lies in the run's folder as `trained`.

    Raises:
        CheckpointError, PlanError, StepError: something does not fit, or the disk refuses.
    """
    student = open_checkpoint(ask.student)
    sources = open_trained(student, ask.folder / "trained")
    facts = handed_on(student)
    plan = healed(*sources, mode=mode or ask.settings.train, handed_on=facts, told=told)
    run(plan, ask.out, force=force, **limits)


def _check_written(ask: Ask, world: World, done: _Done) -> None:
    """Refuse an output that does not compute what was trained.

    Raises:
        TrainError: its loss on a few rows differs by more than rounding costs.
    """
    with ExitStack() as scratch:
        source = open_source(str(ask.out), scratch)
    dtype = find_dtype("bfloat16" if done.half else "float32", world.device)
    loaded = load_shared(source, world, dtype)
    found = _cost(loaded.model, head_of(loaded.model), world, done.rows, half=done.half)
    if not abs(found - done.cost) <= SLACK * max(done.cost, 1.0):
        fact = f"has a loss of {found:.4f} on rows where the trained model has {done.cost:.4f}"
        raise TrainError(ask.out, fact, f"what was trained is in {ask.folder / 'trained'}")


def _cost(model: Any, head: Head, world: World, rows: Rows, *, half: bool) -> float:  # noqa: ANN401
    """Return the nats a token of a few rows of the data."""
    import torch

    model.eval()
    batch = Batch.of(rows, range(CHECKED_ROWS), world.device)
    with torch.no_grad(), computing(world.device, half=half):
        states = states_of(model, batch.inputs(model))
        parts = CE(states.hidden, head.renewed(model), batch.targets)
    put_away(model)
    return float(parts.total) / max(batch.tokens, 1)
