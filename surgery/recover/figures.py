"""The figures of a run, one line of JSON a step."""

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.disk import io_errors

NAME = "metrics.jsonl"


@dataclass(slots=True)
class Curve:
    """What a run has come to.

    Attributes:
        step: steps taken.
        tokens: scored tokens trained on.
        losses: mean loss of every step since the start; resumed runs read theirs from the file.
        skipped: steps whose loss or gradient was out of bounds.
        before, after: nats a token of held-out text.
        stopped: somebody asked the run to save and stop.
    """

    step: int = 0
    tokens: int = 0
    losses: list[float] = field(default_factory=list)
    skipped: int = 0
    before: float | None = None
    after: float | None = None
    stopped: bool = False


class Figures:
    """A file that grows by a line a step, and is cut where a run goes on from a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME

    def cut(self, steps: int) -> list[float]:
        """Keep the first steps only, whole or not at all; return their losses.

        Raises:
            StepError: the disk refuses.
        """
        with io_errors(self.path):
            found = _kept(self.path, steps)
            new = self.path.with_suffix(".tmp")
            new.write_text("".join(f"{line}\n" for line, _ in found))
            new.replace(self.path)
        return [loss for _, loss in found]

    def add(self, told: Mapping[str, Any]) -> None:
        """Append a step's figures; what is not finite becomes null.

        Raises:
            StepError: the disk refuses.
        """
        plain = {name: finite(value) for name, value in told.items()}
        with io_errors(self.path), self.path.open("a") as file:
            file.write(json.dumps(plain) + "\n")

    def sync(self) -> None:
        """Put what was added on disk, before a checkpoint counts on it.

        Raises:
            StepError: the disk refuses.
        """
        with io_errors(self.path), self.path.open("a") as file:
            os.fsync(file.fileno())


def finite(value: Any) -> Any:  # noqa: ANN401 - anything that JSON has
    """Return a value, None for a number that JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _kept(path: Path, steps: int) -> list[tuple[str, float]]:
    """Return lines of the first steps and their losses, in order; NaN where one was not finite."""
    kept: list[tuple[str, float]] = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with suppress(ValueError, KeyError, TypeError):  # the last line may be torn
            told = json.loads(line)
            if told["step"] == len(kept) < steps:
                kept.append((line, math.nan if told["loss"] is None else float(told["loss"])))
    return kept
