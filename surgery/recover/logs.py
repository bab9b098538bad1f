"""Figures of a run for TensorBoard or Weights & Biases, beside the file that is always written."""

import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from surgery.errors import RecipeError, TrainError
from surgery.recover.figures import finite

LOGS = ("tensorboard", "wandb")
Told = Mapping[str, Any]
Add = Callable[[Told], None]
RUN = "wandb-run"  # file with the name of the run over there, so that it is gone on with


def check_logs(chosen: Sequence[str]) -> None:
    """Refuse logs that there are none of, or whose package is not installed; nothing is imported.

    Raises:
        RecipeError: the first such log.
    """
    for log in chosen:
        if log not in LOGS:
            raise RecipeError(f"--log {log}", f"is none of {', '.join(LOGS)}")
        if find_spec(log) is None:
            fact = f"needs the {log} package, which is not installed"
            raise RecipeError(f"--log {log}", fact, f"run: pip install 'model-surgery[{log}]'")


@contextmanager
def logging(
    chosen: Sequence[str], folder: Path, settings: Mapping[str, Any], *, resume: bool
) -> Iterator[Add]:
    """Give what takes a step's figures to every chosen log.

    Args:
        folder: of the run; TensorBoard's files are under `tensorboard`.
        resume: go on with the run of W&B that the folder names.

    Raises:
        TrainError: W&B does not begin.
    """
    with ExitStack() as open_ones:
        kinds = {"tensorboard": _tensorboard, "wandb": _wandb}
        adds = [kinds[log](open_ones, folder, settings, resume=resume) for log in chosen]

        def add(told: Told) -> None:
            values = _numbers(told)
            for each in adds:
                each({"step": told["step"], "values": values})

        yield add


def _numbers(told: Told) -> dict[str, float]:
    """Return what can be drawn: numbers that are finite."""
    found = {name: finite(value) for name, value in told.items() if name not in {"step", "steps"}}
    return {name: value for name, value in found.items() if type(value) in {int, float}}


def _tensorboard(close: ExitStack, folder: Path, settings: Told, *, resume: bool) -> Add:  # noqa: ARG001
    from torch.utils.tensorboard import SummaryWriter

    writers: list[Any] = []

    def add(told: Told) -> None:
        if not writers:  # steps that are taken again replace those of before
            place = str(folder / "tensorboard")
            writers.append(SummaryWriter(place, purge_step=told["step"]))
            close.callback(writers[0].close)
        for name, value in told["values"].items():
            writers[0].add_scalar(name, value, told["step"])

    return add


def _wandb(close: ExitStack, folder: Path, settings: Told, *, resume: bool) -> Add:
    import wandb  # type: ignore[import-not-found]

    file = folder / RUN
    folder.mkdir(parents=True, exist_ok=True)
    if not (resume and file.is_file()):
        file.write_text(secrets.token_hex(4))
    try:
        run = wandb.init(
            project=None if os.environ.get("WANDB_PROJECT") else "surgery",
            name=folder.stem,
            id=file.read_text(),
            resume="allow",
            dir=str(folder),
            config=dict(settings),
        )
    except Exception as error:  # no key, no network, an older run of another kind: many types
        fact = f"does not begin ({type(error).__name__}: {str(error)[:200]})"
        raise TrainError("--log wandb", fact, "see `wandb login`, or set WANDB_MODE=offline") from (
            error
        )
    close.callback(run.finish)
    return lambda told: run.log(told["values"], step=told["step"])
