"""Which weights several fine-tunes changed, and which only one of them."""

from collections.abc import Sequence
from typing import Any

from surgery.method import Tensor


def changes(deltas: Sequence[Tensor], epsilon: float) -> tuple[list[Tensor], Any]:
    """Return the task vectors without what is no larger than epsilon, and how many are left.

    Shapes: flat; the counts are a numpy array of as many elements.
    """
    import numpy as np
    import torch

    kept = [torch.nn.functional.hardshrink(delta, epsilon) for delta in deltas]
    counts = np.zeros(kept[0].shape, np.uint16)
    for one in kept:
        counts += one.numpy() != 0
    return kept, counts


def overlaps(deltas: Sequence[Tensor], epsilon: float) -> Any:  # noqa: ANN401 - a numpy array
    """Count of each task vector what others changed too, and what it alone changed; [models, 2]."""
    import numpy as np

    kept, counts = changes(deltas, epsilon)
    alone = counts == 1
    every = [np.count_nonzero(one.numpy()) for one in kept]
    unique = [np.count_nonzero(one.numpy()[alone]) for one in kept]
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

    from merges.stages.blend import blend

    kept, counts = changes(deltas, epsilon)
    shared = blend(kept, [1.0] * len(kept)).div_(torch.from_numpy(np.maximum(counts, 1)))
    if factors:
        own = blend(kept, factors)
        shared = torch.from_numpy(np.where(counts == 1, own.numpy(), shared.numpy()))
    return shared.add_(base)
