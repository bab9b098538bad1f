"""Task vectors of matrices, read block by block: what the methods on singular values stand on.

A matrix is seen tall, [long, short], transposed where it is stored wide: what is decomposed has
the shorter side's size, and what is read at once is a block of the longer side. All in float64.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, Literal

from surgery.method import Param, PerModel, Place, Tensor

BLOCK = 1 << 20  # numbers of a block: 8 MiB, read once for each reading of the tensor
KERNEL = 8  # a shorter last axis is a convolution's kernel, no side of a matrix

Weight = Annotated[PerModel[float], Param("factor of each task vector")]
EACH: Any = 1.0  # the default of a parameter that has one value per model
Scale = Annotated[float, Param("factor of the merged task vector")]
Tolerance = Annotated[
    float,
    Param("singular values below this share of the largest count as zero", ge=1e-6, lt=1),
]
Others = Annotated[
    Literal["mean", "sum", "base"],
    Param("norms, biases and convolutions: mean or sum of the task vectors, or the base's"),
]
Vocabulary = Annotated[
    Literal["mean", "sum", "base", "svd"],
    Param("embeddings and heads: as `others`, or merged as matrices are"),
]
Merged = Callable[[list[Tensor]], Tensor]  # from a block of every task vector to the merged one


@dataclass(frozen=True, slots=True)
class Vectors:
    """The task vectors of one matrix, each times its weight.

    Attributes:
        base, models: [rows, columns], tensors or `surgery.stored.Stored`.
    """

    base: Any
    models: Sequence[Any]
    weight: Sequence[float]

    @property
    def wide(self) -> bool:
        """Whether blocks are columns."""
        return bool(self.base.shape[0] < self.base.shape[1])

    @property
    def short(self) -> int:
        """Size of the shorter side."""
        return int(min(self.base.shape))

    def places(self) -> list[tuple[int, int]]:
        """Return where blocks start and end, along the longer side."""
        step = max(BLOCK // max(self.short, 1), 1)
        length = max(self.base.shape)
        return [(at, min(at + step, length)) for at in range(0, length, step)]

    def cut(self, tensor: Any, start: int, end: int) -> Tensor:  # noqa: ANN401
        """Return a block of a tensor of this shape, [end - start, short]."""
        found = tensor[:, start:end].T if self.wide else tensor[start:end]
        wide: Tensor = found.double()
        return wide

    def block(self, start: int, end: int, which: Sequence[int] | None = None) -> list[Tensor]:
        """Return a block of the task vectors of all models, or of some."""
        base = self.cut(self.base, start, end)
        chosen = range(len(self.models)) if which is None else which
        found = [self.cut(self.models[n], start, end).sub_(base) for n in chosen]
        return [d.mul_(self.weight[n]) for n, d in zip(chosen, found, strict=True)]

    def blocks(self, which: Sequence[int] | None = None) -> Iterator[list[Tensor]]:
        """Read the task vectors of all models, or of some, block by block."""
        return (self.block(*place, which) for place in self.places())


def total(block: list[Tensor]) -> Tensor:
    """Add up; the first block is overwritten."""
    first, *others = block
    for other in others:
        first += other
    return first


def merged_matrices(
    base: Tensor,
    models: Sequence[Tensor],
    merge: Callable[[Vectors], Merged],
    *,
    weight: Sequence[float],
    scale: float,
    rule: str,
) -> Iterator[Tensor]:
    """Yield a merged tensor's pieces in order: matrices by `merge`, or all of it by a rule.

    Args:
        merge: reads the task vectors of one matrix as often as it wants.
        rule: as `rule_of` tells.
    """
    if rule != "svd":
        yield from _averaged(base, models, rule, weight, scale)
        return
    stack = base.shape[0] if len(base.shape) > 2 else None  # noqa: PLR2004 - experts
    for n in range(1 if stack is None else stack):
        own, *others = [t if stack is None else t[n] for t in (base, *models)]
        vectors = Vectors(own, others, weight)
        yield from _written(vectors, merge(vectors), scale)


def rule_of(shape: Sequence[int], *, others: str, vocabulary: str, place: Place) -> str:
    """Return how a tensor of that shape is merged: "svd", or a rule for what is no matrix."""
    matrix = len(shape) == 2 or (len(shape) == 3 and min(shape[1:]) >= KERNEL)  # noqa: PLR2004
    return (vocabulary if place.vocabulary else "svd") if matrix else others


Holds = Callable[[Mapping[str, Any], tuple[int, ...], int, int], int]


def held_bytes(bytes_of: Callable[[int, int, int, Mapping[str, Any]], int]) -> Holds:
    """Return what tells the plan the bytes that a method holds.

    Args:
        bytes_of: from the longer and the shorter side of a matrix, the number of models and the
            values, what `merge` and its function hold at most.
    """

    def holds(values: Mapping[str, Any], shape: tuple[int, ...], models: int, width: int) -> int:
        told = {name: values[name] for name in ("others", "vocabulary", "place")}
        row = prod(shape[1:])
        if rule_of(shape, **told) != "svd":
            return (models + 4) * 8 * max(BLOCK, row)
        long, short = max(shape[-2:]), min(shape[-2:])
        blocks = (models + 4) * 8 * max(BLOCK, short)
        out = long * short * width if shape[-2] < shape[-1] else 0
        return blocks + out + bytes_of(long, short, models, values)

    return holds


def _averaged(
    base: Tensor, models: Sequence[Tensor], rule: str, weight: Sequence[float], scale: float
) -> Iterator[Tensor]:
    if not len(base.shape):
        base, models = base[...].reshape(1), [model[...].reshape(1) for model in models]
    scale *= {"mean": 1 / len(models), "sum": 1.0, "base": 0.0}[rule]
    step = max(BLOCK // max(prod(base.shape[1:]), 1), 1)
    for at in range(0, base.shape[0], step):
        own, *others = [t[at : at + step].double() for t in (base, *models)]
        deltas = [(p - own) * w for p, w in zip(others, weight, strict=True)]
        yield own.add(total(deltas), alpha=scale).to(base.dtype)


def _written(vectors: Vectors, merged: Merged, scale: float) -> Iterator[Tensor]:
    import torch

    kind, out = vectors.base.dtype, None
    if vectors.wide:
        out = torch.empty(tuple(vectors.base.shape), dtype=kind)
    for start, end in vectors.places():
        found = merged(vectors.block(start, end)).mul_(scale)
        found += vectors.cut(vectors.base, start, end)
        if out is None:
            yield found.to(kind)
        else:
            out[:, start:end] = found.T
    if out is not None:
        yield out
