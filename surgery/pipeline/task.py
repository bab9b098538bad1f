"""What a pipeline is asked for, and what it answers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from surgery.plan import Plan
from surgery.shards import SHARD_SIZE

Paths = Mapping[str, Path]
Told = Mapping[str, Mapping[str, float]]
_ahead: ContextVar[bool] = ContextVar("ahead", default=False)


@contextmanager
def looking_ahead() -> Iterator[None]:
    """Tell those who plan that nothing will be run yet, and that inputs may have no weights."""
    token = _ahead.set(True)
    try:
        yield
    finally:
        _ahead.reset(token)


def is_ahead() -> bool:
    """Whether a plan is asked for only to look ahead; then no weights may be read for it."""
    return _ahead.get()


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan, and the limits it is to be run by (those of `surgery.run.run`).

    Attributes:
        in_all: makes of what the plan's steps told, by tensor, figures of the whole.
    """

    plan: Plan
    limits: Mapping[str, Any] = field(default_factory=dict)
    in_all: Callable[[Told], Mapping[str, Any]] = lambda _: {}

    @property
    def shard_size(self) -> int:
        """Bytes of tensor data per file."""
        return int(self.limits.get("shard_size", SHARD_SIZE))


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A step of a pipeline: it makes a checkpoint by a plan, or measures.

    Attributes:
        name: of the step, and of its output in the pipeline's folder.
        what: the command or operation, in a word or two.
        uses: earlier steps whose outputs it takes.
        keep: whether the output stays when the last step that uses it is done.
        place: where the step is written.
        plan: given where the used outputs are, returns the plan; None for a measurement.
        measure: given where the used outputs are, returns a JSON document as text.
        asked: identifies a measurement, beside the outputs used and the files that `asked` names.
    """

    name: str
    what: str
    uses: tuple[str, ...] = ()
    keep: bool = True
    place: str = ""
    plan: Callable[[Paths], Planned] | None = None
    measure: Callable[[Paths], str] | None = None
    asked: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What is to be done for a step, known before anything runs.

    Attributes:
        state: `run` it; run it `perhaps`, which depends on how an earlier step comes out; it is
            `fresh`; it is `removed`, and nothing needs it.
        why: the reason in words.
        disk: bytes of the weights that it writes.
        replaces: bytes of an output that stands there and would be replaced.
    """

    task: Task
    state: Literal["run", "perhaps", "fresh", "removed"]
    why: str
    disk: int = 0
    replaces: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was done for a step.

    Attributes:
        state: `made`, `measured`, `skipped`, or `removed` and not needed again.
        why: the reason in words.
        output: where its output is, or was.
        reused: plan steps that an interrupted run had finished.
        notes: of its plan, where it was run.
        told: what the plan's steps found out, by tensor.
        total: figures of the whole.
    """

    task: Task
    state: Literal["made", "measured", "skipped", "removed"]
    why: str
    output: Path
    seconds: float = 0.0
    bytes_out: int = 0
    reused: int = 0
    notes: tuple[str, ...] = ()
    told: Told = field(default_factory=dict)
    total: Mapping[str, Any] = field(default_factory=dict)
