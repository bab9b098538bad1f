"""What a recovery is asked for; nothing heavy is loaded to check it."""

from dataclasses import dataclass
from pathlib import Path

from surgery.checkpoint import open_checkpoint
from surgery.errors import RecipeError
from surgery.recover.settings import Settings
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

    @property
    def folder(self) -> Path:
        """Where the run keeps its checkpoints and figures."""
        return self.out.with_name(f"{self.out.name}.surgery-run")


def check_ask(ask: Ask) -> None:
    """Refuse an ask that cannot be met, before torch is loaded.

    Raises:
        RecipeError: losses and teacher do not fit, or the output stands in the way.
        CheckpointError: student or teacher cannot be opened.
    """
    _check_teacher(ask)
    open_checkpoint(ask.student)
    if ask.teacher is not None:
        open_checkpoint(ask.teacher)


def _check_teacher(ask: Ask) -> None:
    """Refuse losses that need a teacher without one, and a teacher that no loss asks.

    Raises:
        RecipeError: either.
    """
    given = ask.teacher is not None or ask.cache is not None
    if ask.teacher is not None and ask.cache is not None:
        fact = "and --teacher-cache name the teacher twice"
        raise RecipeError("--teacher", fact, "name one of them")
    if ask.settings.needs_teacher and not given:
        names = ", ".join(name for name in ask.settings.losses if name != "ce")
        fact = f"{names} compares with a teacher, and there is none"
        raise RecipeError("--loss", fact, "name the parent with --teacher")
    if given and not ask.settings.needs_teacher:
        raise RecipeError("--teacher", "is asked by no loss", "add kl=1 to --loss, or leave it out")
