"""Losses out of bounds: which step is taken, which is skipped, when to go back."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from surgery.errors import RecipeError, TrainError

Verdict = Literal["take", "skip", "roll back"]
LEAST = 8  # losses that a mean needs before a loss is measured by it


class Guard:
    """Judges every step by its loss and gradient norm; decides by numbers alone.

    A step is skipped where its loss or norm is not finite, or its loss is more than
    `spike_factor` times the mean loss of the last `window` steps that were taken. Norms are only
    asked to be finite: clipping bounds the others. `patience` skips in a row mean that the
    weights themselves are off, and that the run should go back to where they were good; the
    mean then starts anew.

    Attributes:
        skipped: steps not taken since the start.
        rollbacks: how often the run went back.
    """

    def __init__(self, spike_factor: float = 4.0, patience: int = 5, window: int = 32) -> None:
        """Take the bounds.

        Args:
            spike_factor: above 1; 0 looks at finiteness alone.
            patience: skips in a row that send the run back.
            window: taken steps that the mean is of.

        Raises:
            RecipeError: one of them makes no sense.
        """
        if spike_factor and not 1 < spike_factor < math.inf:
            fact = "would skip steps that are not above the mean"
            raise RecipeError(f"--spike {spike_factor:g}", fact, "give more than 1, or 0 for none")
        for name, value in (("patience", patience), ("window", window)):
            if value < 1:
                raise RecipeError(f"{name} {value}", "is below 1")
        self.spike_factor, self.patience, self.window = spike_factor, patience, window
        self.skipped = self.rollbacks = 0
        self._losses: deque[float] = deque(maxlen=window)
        self._in_row = 0
        self._fresh = False  # went back, and has not taken a step since

    def judge(self, loss: float, norm: float) -> Verdict:
        """Return what to do with a step: take it, skip it, or roll the run back.

        Raises:
            TrainError: it went back, and still has not one step that could be taken.
        """
        if not self._is_out(loss, norm):
            self._losses.append(loss)
            self._in_row, self._fresh = 0, False
            return "take"
        self.skipped += 1
        self._in_row += 1
        if self._in_row < self.patience:
            return "skip"
        if self._fresh:
            fact = (
                f"no step can be taken, after going back either "
                f"(loss {loss:g}, gradient norm {norm:g})"
            )
            raise TrainError("the run", fact, "lower --lr, or look for damaged weights or data")
        self.rollbacks += 1
        self._in_row, self._fresh = 0, True
        self._losses.clear()
        return "roll back"

    @property
    def doubts(self) -> bool:
        """Whether the latest step was not taken: the weights may be off already."""
        return self._in_row > 0

    def state(self) -> dict[str, Any]:
        """Return what is remembered, for JSON, which keeps every bit of a float."""
        return {
            "losses": list(self._losses),
            "in_row": self._in_row,
            "fresh": self._fresh,
            "skipped": self.skipped,
            "rollbacks": self.rollbacks,
        }

    def restore(self, told: Mapping[str, Any]) -> None:
        """Remember what `state` told."""
        losses: Sequence[float] = told["losses"]
        self._losses = deque(losses, maxlen=self.window)
        self._in_row, self._fresh = int(told["in_row"]), bool(told["fresh"])
        self.skipped, self.rollbacks = int(told["skipped"]), int(told["rollbacks"])

    def _is_out(self, loss: float, norm: float) -> bool:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return True
        known = len(self._losses)
        if not self.spike_factor or known < min(LEAST, self.window):
            return False
        mean = math.fsum(self._losses) / known
        return loss > self.spike_factor * mean > 0
