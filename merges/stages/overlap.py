"""Which weights several fine-tunes changed, and which only one of them."""

from collections.abc import Sequence
from typing import Any

from merges.stages.blend import blend
from merges.stages.pick import pick
from surgery.method import Tensor


def _changes(deltas: Sequence[Tensor], epsilon: float) -> list[Tensor]:
    """Return the task vectors without what is no larger than epsilon."""
    import torch

    return [torch.nn.functional.hardshrink(delta, epsilon) for delta in deltas]


def _counts(changed: Sequence[Any]) -> Any:  # noqa: ANN401 - numpy arrays
    """Return how many models changed each element."""
    import numpy as np

    counts = np.zeros(changed[0].shape, np.uint8 if len(changed) < 256 else np.uint32)  # noqa: PLR2004
    for mask in changed:
        counts += mask
    return counts


def overlaps(deltas: Sequence[Tensor], epsilon: float) -> Any:  # noqa: ANN401 - a numpy array
    """Count of each task vector what others changed too, and what it alone changed; [models, 2]."""
    import numpy as np

    changed = [one.numpy() != 0 for one in _changes(deltas, epsilon)]
    alone = _counts(changed) == 1
    every = [np.count_nonzero(mask) for mask in changed]
    unique = [np.count_nonzero(mask & alone) for mask in changed]
    return np.array([(all_ - own, own) for all_, own in zip(every, unique, strict=True)])


def boosts(found: Any, r: float, alpha: float) -> list[float]:  # noqa: ANN401 - a numpy array
    """Return what RAM+ multiplies each task vector by where it alone changed a weight."""
    ratios = [float(shared / own) if own else 0.0 for shared, own in found]
    return [1 + r * min(ratio, alpha) for ratio in ratios]


def reinforced(
    base: Tensor, deltas: Sequence[Tensor], epsilon: float, factors: Sequence[float] = ()
) -> Tensor:
    """Add to the base the mean of shared changes, and unique ones times their model's factor."""
    import numpy as np
    import torch

    kept = _changes(deltas, epsilon)
    counts = _counts([one.numpy() != 0 for one in kept])
    merged = blend(kept, [1.0] * len(kept))
    divisors = np.maximum(counts, 1).astype(merged.numpy().dtype)
    merged.div_(torch.from_numpy(divisors))
    if factors:
        own = blend(kept, factors)
        merged = torch.from_numpy(pick(counts == 1, own.numpy(), merged.numpy()))
    return merged.add_(base)
