"""What commands share that need a model's activations: options, and one measurement kept."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from cli import render
from cli.writing import Writing
from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.errors import RecipeError, SurgeryError
from surgery.pipeline import is_ahead
from surgery.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Measuring:
    """The options of a command that measures; their annotations are the command line's."""

    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            "--calibration",
            "--text",
            metavar="FILE",
            help="Text to run the model over (.jsonl: a document a line; repeatable), or one "
            ".safetensors file that `surgery calibrate` wrote.",
        ),
    ] = None
    statistics: Annotated[
        Path | None,
        typer.Option(help="Where to keep what is measured.  [default: OUTPUT-calibration...]"),
    ] = None
    context: Annotated[
        int | None,
        typer.Option(help="Tokens of a row.  [default: what the model takes, up to 2048]"),
    ] = None
    samples: Annotated[int, typer.Option(help="Rows of text at most.")] = 128
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")] = "cpu"

    @property
    def texts(self) -> list[Path]:
        """The files of text."""
        return [path for path in self.calibration or () if path.suffix != ".safetensors"]

    @property
    def given(self) -> list[str]:
        """The options that are not at their defaults, as they are typed."""
        plain = Measuring()
        return [
            f"--{field.name}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(plain, field.name)
        ]

    def need_none(self, what: str) -> None:
        """Refuse options that nothing would look at.

        Raises:
            RecipeError: one is given.
        """
        for option in self.given:
            raise RecipeError(option, f"is of no use to {what}, which measures nothing", "drop it")

    def need(self, method: str) -> None:
        """Refuse to go on without a calibration.

        Raises:
            RecipeError: none is named, or text and statistics at once, or statistics and an option
                of how to measure.
        """
        given = self.calibration or []
        if not given:
            fact = "needs --calibration: it goes by what the model does with text"
            raise RecipeError(method, fact, "name a text file, a few hundred lines are enough")
        if len(given) > 1 and len(self.texts) < len(given):
            fact = "names statistics and something else"
            raise RecipeError("--calibration", fact, "name one file of statistics, or texts")
        missing = next((path for path in given if not path.is_file()), None)
        if missing is not None:
            raise RecipeError(f"--calibration {missing}", "is not there", "name a file")
        for option in () if self.texts else self.given[1:]:  # the first is the calibration
            fact = f"is of no use beside {given[0]}, which is measured already"
            raise RecipeError(option, fact, "drop it, or name text: --calibration FILE.jsonl")


def measuring_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes `measuring: Measuring` each of its fields as an option."""
    shared = signature(Measuring).parameters
    own = signature(command).parameters

    @wraps(command)
    def wrapper(*args: object, **given: object) -> None:
        measuring = Measuring(**{name: given.pop(name) for name in shared})  # type: ignore[arg-type]
        command(*args, **given, measuring=measuring)

    joined = [p for name, p in own.items() if name != "measuring"]
    more = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in shared.values()]
    at = next((i for i, p in enumerate(joined) if p.name == "writing"), len(joined))
    parameters = [*joined[:at], *more, *joined[at:]]
    wrapper.__signature__ = signature(command).replace(parameters=parameters)  # type: ignore[attr-defined]
    return wrapper


@contextmanager
def measured(
    guess: Plan, out: Path, collect: Collection[str], *, measuring: Measuring, writing: Writing
) -> Iterator[Checkpoint | None]:
    """Give statistics of a model: those named, those kept of the same ask, or measured now.

    None while a pipeline looks ahead and there are none yet. What a dry run measures is gone
    when the context ends.

    Args:
        guess: a plan of the same model that needs none: an output that it could not be written to
            costs no measurement, and replaces none.
        out: what the statistics are named after.
    """
    base, texts = guess.sources[0], measuring.texts
    if not texts:
        yield open_checkpoint(str((measuring.calibration or [Path()])[0]))
        return
    writing.check_output(guess, out)
    place = measuring.statistics or _beside(out)
    asked = _asked(base, texts, collect, measuring)
    kept = _kept(place, base, asked)
    if kept is not None or is_ahead():
        yield kept
    elif writing.dry_run:
        with TemporaryDirectory(prefix="surgery-") as folder:
            place = Path(folder) / place.name
            yield _measure(base, place, collect, asked, measuring=measuring, writing=writing)
    else:
        yield _measure(base, place, collect, asked, measuring=measuring, writing=writing)


def _measure(
    base: Checkpoint,
    place: Path,
    collect: Collection[str],
    asked: str,
    *,
    measuring: Measuring,
    writing: Writing,
) -> Checkpoint:
    from surgery.calibrate import calibrate

    with render.progress(f"calibrate {base.name}", counted=True) as progress:
        calibrate(
            base.ref if base.adapters else base.root,
            measuring.texts,
            place,
            collect=collect,
            context=measuring.context,
            samples=measuring.samples,
            device=measuring.device,
            memory=writing.limits()["memory"],
            force=_is_ours(place),
            note={"asked": asked},
            progress=progress,
        )
    return open_checkpoint(str(place))


def _beside(out: Path) -> Path:
    return out.with_name(f"{out.name.removesuffix('.safetensors')}-calibration.safetensors")


def _asked(
    base: Checkpoint, texts: Collection[Path], collect: Collection[str], measuring: Measuring
) -> str:
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in texts]
    told = [digests, sorted(collect), measuring.context, measuring.samples, measuring.device]
    return hashlib.sha256(json.dumps([base.name, told]).encode()).hexdigest()


def _kept(place: Path, base: Checkpoint, asked: str) -> Checkpoint | None:
    """Return what an earlier run has measured, where it was asked for the same."""
    if not place.is_file():
        return None
    from surgery.calibrate.statistics import open_statistics

    try:
        found = open_statistics(place, base)
    except SurgeryError:
        return None
    return found.checkpoint if found.checkpoint.metadata.get("asked") == asked else None


def _is_ours(place: Path) -> bool:
    """Whether a file may be replaced: it is one of statistics."""
    if not place.is_file():
        return False
    try:
        return open_checkpoint(str(place)).metadata.get("surgery") == "statistics"
    except SurgeryError:
        return False
