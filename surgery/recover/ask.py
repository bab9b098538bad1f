"""What a recovery is asked for; nothing heavy is loaded to check it."""

from dataclasses import dataclass
from pathlib import Path

from surgery.checkpoint import open_checkpoint
from surgery.checkpoint.adapters import CONFIG
from surgery.errors import CheckpointError, PlanError, RecipeError
from surgery.preflight import check_place
from surgery.recover.kernels import check_kernels
from surgery.recover.logs import check_logs
from surgery.recover.readable import check_readable
from surgery.recover.settings import NEEDS_TEACHER, Settings
from surgery.recover.sources import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What is to be healed, with what.

    Attributes:
        student: a checkpoint, adapters fused.
        data: what it is trained on.
        out: where the result goes; `OUT.surgery-run` beside it holds the run.
        teacher: the parent whose answers the student is to give, run along.
        cache: the teacher's answers, kept by `surgery teacher cache`.
        replay: mixed in by `settings.replay`.
        held_out: text that is only measured.
        device: cpu, cuda, ...
        resume: go on where an earlier run stopped.
        keep_adapter: keep LoRA's adapter beside the output.
        logs: other places that get the figures of every step.
    """

    student: str
    data: tuple[Source, ...]
    out: Path
    settings: Settings
    teacher: str | None = None
    cache: Path | None = None
    replay: tuple[Source, ...] = ()
    held_out: tuple[Path, ...] = ()
    device: str = "cpu"
    resume: bool = True
    keep_adapter: bool = False
    logs: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where the run keeps its checkpoints and figures."""
        return self.out.with_name(f"{self.out.name}.surgery-run")

    @property
    def adapter(self) -> Path:
        """Where LoRA's adapter is kept, if it is."""
        return self.out.with_name(f"{self.out.name}-adapter")


def check_ask(ask: Ask, *, force: bool = False) -> None:
    """Refuse an ask that cannot be met, before torch is loaded.

    Args:
        force: a model that stands at the output may be replaced.

    Raises:
        RecipeError: losses and teacher do not fit.
        CheckpointError: student, teacher or data cannot be opened, or the student not be trained.
        PlanError: something stands at the output, or it cannot be written.
    """
    from surgery.recover.selected import check_student, recorded  # with numpy

    _check_teacher(ask)
    check_logs(ask.logs)
    check_kernels(ask.settings, ask.device)
    student = open_checkpoint(ask.student)
    check_student(student)
    if ask.settings.train == "new":
        recorded(student)
    sources = [student]
    if ask.teacher is not None:
        sources.append(open_checkpoint(ask.teacher))
    _check_files(ask)
    check_place(ask.out, sources, bare=False, force=force)
    _check_adapter(ask)


def _check_files(ask: Ask) -> None:
    """Refuse data that is not there, or is no text.

    Raises:
        CheckpointError: the first such file.
    """
    check_readable((*ask.data, *ask.replay), ask.held_out)
    if ask.cache and not Path(ask.cache).exists():
        raise CheckpointError(ask.cache, "does not exist")


def _check_adapter(ask: Ask) -> None:
    """Refuse to keep an adapter that there is none of, or that cannot lie where it goes.

    Raises:
        RecipeError, PlanError: either.
    """
    if not ask.keep_adapter:
        return
    if ask.settings.train != "lora":
        fact = f"keeps what --train lora makes, and this is --train {ask.settings.train}"
        raise RecipeError("--keep-adapter", fact, "leave it out")
    if ask.adapter.exists() and not (ask.adapter / CONFIG).exists():
        raise PlanError(ask.adapter, "is there, and is no adapter", "move it away")


def _check_teacher(ask: Ask) -> None:
    """Refuse losses that need a teacher without one, and a teacher that no loss asks.

    Raises:
        RecipeError: either.
    """
    given = ask.teacher is not None or ask.cache is not None
    if ask.settings.correct_teacher and ask.teacher is None:
        fact = "trains a teacher that runs along, and there is none"
        raise RecipeError("--correct-teacher", fact, "name it with --teacher")
    if ask.teacher is not None and ask.cache is not None:
        fact = "and --teacher-cache name the teacher twice"
        raise RecipeError("--teacher", fact, "name one of them")
    if ask.settings.needs_teacher and not given:
        names = ", ".join(name for name in ask.settings.losses if name in NEEDS_TEACHER)
        fact = f"{names} compares with a teacher, and there is none"
        raise RecipeError("--loss", fact, "name the parent with --teacher")
    if ask.settings.select is not None and ask.teacher is None:
        fact = "compares the student with its parent, and there is none"
        raise RecipeError(f"--select {ask.settings.select}", fact, "name it with --teacher")
    asked = ask.settings.needs_teacher or ask.settings.select is not None
    if given and not asked:
        raise RecipeError("--teacher", "is asked by no loss", "add kl=1 to --loss, or leave it out")
