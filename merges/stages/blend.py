"""Sums of tensors, each times a number."""

from collections.abc import Sequence

from surgery.method import Tensor


def blend(
    vectors: Sequence[Tensor], factors: Sequence[float], *, start: Tensor | None = None
) -> Tensor:
    """Return the sum of the vectors, each times its factor, and of what it starts from."""
    import torch

    if start is None:
        result = vectors[0] * factors[0]
    else:
        result = torch.add(start, vectors[0], alpha=factors[0])
    for vector, factor in zip(vectors[1:], factors[1:], strict=True):
        result.add_(vector, alpha=factor)
    return result


def plain_blend(vectors: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """Return the same sum by operators alone; a vector whose factor is zero has no say."""
    used = [(v, f) for v, f in zip(vectors, factors, strict=True) if f]
    return blended([v for v, _ in used], [f for _, f in used])


def blended(vectors: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """Return the sum of the vectors, each times its factor, by operators alone."""
    result = vectors[0] * factors[0]
    for vector, factor in zip(vectors[1:], factors[1:], strict=True):
        result += vector * factor
    return result
