"""The goal of a transfer: each layer by itself gives what its softmax attention gave."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from surgery.linearize.comparing import (
    Pair,
    attention_entropy,
    pass_through,
    relative_error,
)
from surgery.linearize.methods import METHODS
from surgery.linearize.transfer_ask import ATTENTION, TRANSFER, TransferSettings
from surgery.models.linear_layer import converted, keep_teacher
from surgery.recover.batch import Batch
from surgery.recover.data import Rows
from surgery.recover.goal import scale_down
from surgery.recover.names import layer_of
from surgery.recover.session import HELD_OUT_ROWS, Session, computing
from surgery.recover.settings import Settings

LAYER = "layer."  # what its figures are called, before its number
Feed = Callable[[Rows, Batch], Mapping[str, Any]]


def keep_own_teacher(model: Any) -> None:  # noqa: ANN401 - a linearized model
    """Keep the attention of a model before it trains, where its method trains projections."""
    if METHODS[model.config.mixer["method"]].projections:
        keep_teacher(model)


class TransferGoal:
    """Mean over layers of the relative error of attention outputs, before their projection.

    The gradient of a layer is that of its own error, not divided by the number of layers, and is
    clipped by itself: what a layer learns does not depend on which others are trained.

    Attributes:
        details: errors by layer, `before` and `after`.
    """

    def __init__(self, session: Session, feed: Feed | None = None) -> None:
        """Take an opened run.

        Args:
            feed: what the decoder is given for rows; their tokens by default.
        """
        self.session, self.settings, self.world = session, session.settings, session.world
        self.model = session.loaded.model
        self.layers = sorted(converted(self.model))
        self.feed = feed or (lambda _, batch: batch.inputs(self.model))
        assert isinstance(self.settings, TransferSettings)  # noqa: S101 - `check_transfer` made them
        self.weight = self.settings.attention_weight
        self.details: dict[str, Any] = {}

    def backward(self, batch: Batch, tokens: float) -> dict[str, float]:
        """See `Goal`; every layer's graph is gone before the next layer begins."""
        share = self.world.size * batch.tokens / max(tokens, 1)
        return self._run(self.session.rows, batch, share)

    def measure(self) -> float:
        """Return the mean error over held-out rows, or rows of the first step where none are."""
        sums: dict[str, float] = {}
        total, rows = 0.0, self.session.held_out or self.session.rows
        count = measured_count(self.settings, self.session.rows, self.session.held_out)
        with torch.no_grad():
            for first in range(0, count, self.world.size):
                index = first + self.world.rank
                batch = Batch.of(rows, [index % count], self.world.device, empty=index >= count)
                for name, value in self._run(rows, batch, 0.0).items():
                    sums[name] = sums.get(name, 0.0) + value
                total += batch.tokens
        names = sorted(sums)
        *found, total = self.world.total(*(sums[name] for name in names), total)
        means = {name: value / max(total, 1) for name, value in zip(names, found, strict=True)}
        by_layer = {n.removeprefix(LAYER): v for n, v in means.items() if n.startswith(LAYER)}
        self.details.setdefault("before", by_layer)
        self.details["after"] = by_layer
        return means["loss"]

    def clip(self, parameters: Mapping[str, torch.nn.Parameter], norm: float) -> None:  # noqa: ARG002
        """Bound the gradients of each layer by themselves."""
        for layer in self.layers:
            own = [p for name, p in parameters.items() if layer_of(name) == layer]
            grads = [p.grad for p in own if p.grad is not None]
            length = float(torch.nn.utils.get_total_norm(grads))
            scale_down(own, length, self.settings.clip)

    def told(self) -> dict[str, Any]:
        """Return errors at both ends, of all layers and of each."""
        before, after = (self.details.get(end, {}) for end in ("before", "after"))
        return {
            "held_out": None,
            "errors": {"before": mean_of(before), "after": mean_of(after)},
            "measured_on": "data" if self.session.held_out is None else "held-out text",
            "layers": {n: {"before": before[n], "after": after[n]} for n in before},
        }

    def _run(self, rows: Rows, batch: Batch, share: float) -> dict[str, float]:
        """Run rows to the last linear layer; return sums over their tokens."""
        found: dict[str, Tensor] = {}
        real = torch.arange(rows.context, device=batch.ids.device) < batch.fills[:, None]

        def each(layer: int, pair: Pair) -> None:
            for name, value in self._losses(replace(pair, keep=pair.keep & real), share).items():
                found[f"{LAYER}{layer}" if name == TRANSFER else f"{name}.{layer}"] = value

        with computing(self.world.device, half=self.session.half_precision):
            inputs = self.feed(rows, batch)
            pass_through(self.model, inputs, each=each, end=self.layers[-1] + 1)
        values = torch.stack(list(found.values())).tolist()  # the device is waited for once
        sums = {name: value * batch.tokens for name, value in zip(found, values, strict=True)}
        return self._summed(sums)

    def _losses(self, pair: Pair, share: float) -> dict[str, Tensor]:
        with torch.autocast(pair.student.device.type, enabled=False):
            parts = {TRANSFER: relative_error(pair)}
            if self.weight:
                parts[ATTENTION] = attention_entropy(pair)
            total = parts[TRANSFER] + self.weight * parts.get(ATTENTION, 0.0)
            if share:
                (total * share).backward()  # type: ignore[no-untyped-call]
        return {name: part.detach() for name, part in parts.items()}

    def _summed(self, sums: dict[str, float]) -> dict[str, float]:
        """Add the means over layers: of the errors, and of the loss."""
        of = {n: [v for name, v in sums.items() if name.startswith(n)] for n in (LAYER, ATTENTION)}
        error = sum(of[LAYER]) / len(self.layers)
        if not self.weight:
            return {"loss": error, **sums}
        entropy = sum(of[ATTENTION]) / len(self.layers)
        return {"loss": error + self.weight * entropy, "error": error, **sums}


def measured_count(settings: Settings, rows: Rows, held_out: Rows | None) -> int:
    """Return how many rows are measured, of held-out text or else of the first step."""
    if held_out is not None:
        return min(len(held_out), HELD_OUT_ROWS)
    return min(settings.batch_rows, len(rows))


def mean_of(by_layer: Mapping[str, float]) -> float | None:
    """Return the mean over layers; None where nothing was measured."""
    return sum(by_layer.values()) / len(by_layer) if by_layer else None
