"""What blocks told, as if one run had trained all layers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from surgery.recover.figures import Curve


@dataclass(frozen=True, slots=True)
class Part:
    """One block.

    Attributes:
        told: what its run told.
        layers: the converted layers in it.
        losses: of every step.
    """

    told: Mapping[str, Any]
    layers: tuple[int, ...]
    losses: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON holds."""
        return asdict(self)

    @classmethod
    def read(cls, path: Path) -> "Part":
        """Return what `as_dict` told."""
        told = json.loads(path.read_text())
        return cls(told["told"], tuple(told["layers"]), tuple(told["losses"]))


def summed(parts: Sequence[Part]) -> dict[str, Any]:
    """Return what the record holds: means over all layers, and sums over blocks."""
    if not parts:
        return {}
    told = [part.told for part in parts]
    layers = {n: errors for one in told for n, errors in one["layers"].items()}
    ends = {end: _mean([errors[end] for errors in layers.values()]) for end in ("before", "after")}
    steps = min(len(part.losses) for part in parts)
    kept = [step for step, _ in told[0]["losses"] if step < steps]
    return {
        **told[0],
        "parameters_trained": sum(one["parameters_trained"] for one in told),
        "steps_skipped": sum(one["steps_skipped"] for one in told),
        "losses": [[step, _loss(parts, step)] for step in kept],
        "errors": ends,
        "layers": layers,
    }


def curve_of(parts: Sequence[Part], *, stopped: bool) -> Curve:
    """Return the run as one; steps that not all blocks have taken are left out."""
    steps = min((len(part.losses) for part in parts), default=0)
    errors = summed(parts).get("errors", {})
    return Curve(
        step=steps,
        tokens=parts[-1].told["tokens"] if parts else 0,
        losses=[_loss(parts, step) for step in range(steps)],
        skipped=sum(part.told["steps_skipped"] for part in parts),
        before=errors.get("before"),
        after=errors.get("after"),
        stopped=stopped,
    )


def _loss(parts: Sequence[Part], step: int) -> float:
    """Return the mean over layers."""
    layers = sum(len(part.layers) for part in parts)
    return sum(part.losses[step] * len(part.layers) for part in parts) / layers


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
