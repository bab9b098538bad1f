"""Which weights belong to a task: by its share of what all tasks add up to."""

from collections.abc import Sequence

from surgery.method import Tensor


def added_up(vectors: Sequence[Tensor]) -> Tensor:
    """Return the sum, fresh."""
    total = vectors[0].clone()
    for vector in vectors[1:]:
        total.add_(vector)
    return total


def localized(delta: Tensor, total: Tensor, bound: float) -> Tensor:
    """Return the TALL mask of a task, 1 where |delta| > bound * |total - delta|, else 0."""
    import torch

    others = torch.sub(total, delta).abs_().mul_(bound)
    return delta.abs().gt_(others)
