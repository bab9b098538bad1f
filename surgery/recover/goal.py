"""What a run brings down: its gradients, its measure, and how its steps are bounded."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from surgery.recover.batch import Batch
from surgery.recover.distributed import put_away
from surgery.recover.heads import Head, States, states_of
from surgery.recover.losses import Objective
from surgery.recover.session import HELD_OUT_ROWS, Session, computing

if TYPE_CHECKING:
    import torch

CE = Objective({"ce": 1.0})


class Goal(Protocol):
    """A loss over batches.

    Attributes:
        details: figures of both ends beside the measure, of JSON; kept by checkpoints.
    """

    details: dict[str, Any]

    def backward(self, batch: Batch, tokens: float) -> dict[str, float]:
        """Add a batch's gradients; return sums over its tokens, that of `loss` among them.

        Args:
            tokens: those of the step, over all batches and processes.
        """
        ...

    def measure(self) -> float | None:
        """Return the mean over rows that are only measured; None where there are none."""
        ...

    def clip(self, parameters: "Mapping[str, torch.nn.Parameter]", norm: float) -> None:
        """Bound the gradients, whose length over all parameters is `norm`."""
        ...

    def told(self) -> dict[str, Any]:
        """Return what the record holds of the goal, beside what it holds of every run."""
        ...


class OnLogits:
    """The losses of a recovery: on logits, and on states inside the model."""

    def __init__(self, session: Session) -> None:
        self.session, self.settings, self.world = session, session.settings, session.world
        self.objective = Objective(self.settings.losses, temperature=self.settings.temperature)
        self.details: dict[str, Any] = {}

    def backward(self, batch: Batch, tokens: float) -> dict[str, float]:
        """See `Goal`."""
        states = self._states(batch)
        answer = None
        if self.session.teacher is not None:
            with self._precision():
                answer = self.session.teacher.batch(batch)
        with self._precision():
            parts = self.objective(
                states.hidden,
                self._head(),
                batch.targets,
                answer,
                layers=states.layers,
                loops=states.loops,
            )
        (parts.total * (self.world.size / max(tokens, 1))).backward()  # type: ignore[no-untyped-call]
        if self.session.teacher is not None:
            self.session.teacher.put_away()
        sums = {name: float(value) for name, value in parts.parts.items()}
        return {"loss": float(parts.total.detach()), **sums}

    def measure(self) -> float | None:
        """Return the mean nats a token of held-out rows, or None where there are none."""
        rows = self.session.held_out
        if rows is None:
            return None
        import torch

        model = self.session.trainable.model
        count = min(len(rows), HELD_OUT_ROWS)
        total, tokens = 0.0, 0
        model.eval()
        with torch.no_grad():
            for first in range(0, count, self.world.size):
                index = first + self.world.rank
                batch = Batch.of(rows, [index % count], self.world.device, empty=index >= count)
                parts = CE(self._states(batch).hidden, self._head(), batch.targets)
                total, tokens = total + float(parts.total), tokens + batch.tokens
        model.train()
        put_away(model)
        total, whole = self.world.total(total, tokens)
        return total / whole if whole else None

    def clip(self, parameters: "Mapping[str, torch.nn.Parameter]", norm: float) -> None:
        """See `Goal`."""
        scale_down(parameters.values(), norm, self.settings.clip)

    def told(self) -> dict[str, Any]:
        """See `Goal`."""
        return {}

    def _states(self, batch: Batch) -> States:
        asks, model = self.objective, self.session.trainable.model
        with self._precision():
            return states_of(
                model,
                batch.inputs(self.session.loaded.model),
                layers=asks.asks_layers,
                loops=asks.asks_loops,
            )

    def _head(self) -> Head:
        head = self.session.head
        assert head is not None  # noqa: S101 - whole models have one
        return head.renewed(self.session.loaded.model)

    def _precision(self) -> AbstractContextManager[Any]:
        return computing(self.world.device, half=self.session.half_precision)


def scale_down(parameters: Any, norm: float, most: float) -> None:  # noqa: ANN401 - an iterable
    """Scale gradients whose length is `norm` so that it is `most` at most."""
    scale = min(1.0, most / (norm + 1e-6))
    if scale < 1:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad *= scale
