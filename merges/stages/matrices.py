"""Task vectors of matrices, read block by block: what the methods on singular values stand on.

A matrix is seen tall, transposed where it is stored wide: what is decomposed has the size of the
shorter side, and what is read at once is a block of the longer one. All in float64.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, Literal

from surgery.errors import RecipeError
from surgery.method import Param, Place, Tensor

BLOCK = 1 << 20  # numbers of a block: 8 MiB, read once for each reading of the tensor
KEPT = 18  # blocks of temporaries, and those that the allocator keeps (measured)
KERNEL = 8  # a shorter last axis is a convolution's kernel, no side of a matrix

ONE: Any = 1.0  # the default of a parameter that has one value per model
Tolerance = Annotated[
    float,
    Param("singular values below this share of the largest count as zero", ge=1e-6, lt=1),
]
Others = Annotated[
    Literal["mean", "sum", "base"],
    Param("norms, biases and convolutions: mean or sum of the task vectors, or the base's"),
]
Embeddings = Annotated[
    Literal["mean", "sum", "base", "svd"],
    Param("embeddings and heads: as `others`, or merged as matrices are"),
]
Merged = Callable[[list[Tensor]], Tensor]  # from a block of every task vector to the merged one


@dataclass(frozen=True, slots=True)
class Vectors:
    """The task vectors of one matrix, each times its weight.

    Attributes:
        base, models: [rows, columns], tensors or `surgery.stored.Stored`.
        turned: blocks are columns, transposed.
    """

    base: Any
    models: Sequence[Any]
    weight: Sequence[float]
    turned: bool

    @property
    def width(self) -> int:
        """Numbers of a row of a block: rows of a turned matrix, or columns."""
        return int(self.base.shape[0 if self.turned else 1])

    def places(self) -> list[tuple[int, int]]:
        """Return where blocks start and end."""
        step = max(BLOCK // max(self.width, 1), 1)
        length = self.base.shape[1 if self.turned else 0]
        return [(at, min(at + step, length)) for at in range(0, length, step)]

    def cut(self, tensor: Any, start: int, end: int) -> Tensor:  # noqa: ANN401
        """Return a block of a tensor of this shape, [end - start, width]."""
        from torch import float64

        found = tensor[:, start:end].T if self.turned else tensor[start:end]
        own: Tensor = found.to(float64, copy=True)  # to be changed in place
        return own

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
    turned: Callable[[int, int, int], bool] = lambda rows, columns, _: rows < columns,
) -> Iterator[Tensor]:
    """Yield a merged tensor's pieces in order: matrices by `merge`, or all of it by a rule.

    Args:
        merge: reads the task vectors of one matrix as often as it wants.
        rule: as `rule_of` tells.
        turned: from rows, columns and models whether blocks are columns.
    """
    if rule != "svd":
        yield from _averaged(base, models, rule, weight, scale)
        return
    stack = base.shape[0] if len(base.shape) > 2 else None  # noqa: PLR2004 - experts
    for n in range(1 if stack is None else stack):
        own, *others = [t if stack is None else t[n] for t in (base, *models)]
        rows, columns = own.shape
        across = turned(rows, columns, len(others))
        vectors = Vectors(own, others, weight, across)
        yield from _written(vectors, merge(vectors), scale)


def layered(
    scale: float, *, lines_alpha: float | None, lines_beta: float | None, place: Place
) -> float:
    """Return the merged task vector's factor, with LiNeS by the layer's depth.

    Source: LiNeS, arXiv 2410.17146, equation 2.
    """
    if lines_alpha is None:
        return scale
    beta = 1 - lines_alpha if lines_beta is None else lines_beta
    return scale * (lines_alpha + beta * (place.depth or 0.0))


def check_lines(values: Mapping[str, Any]) -> None:
    """Refuse a slope without a start, which would need a statistic of the whole model.

    Raises:
        RecipeError: `lines_beta` without `lines_alpha`.
    """
    if values["lines_alpha"] is None and values["lines_beta"] is not None:
        fact = "needs lines_alpha beside it in this method"
        raise RecipeError("lines_beta", fact, "give both, or lines_alpha alone")


def rule_of(shape: Sequence[int], *, others: str, embeddings: str, place: Place) -> str:
    """Return how a tensor of that shape is merged: "svd", or a rule for what is no matrix."""
    return (embeddings if place.vocabulary else "svd") if is_matrix(shape) else others


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether a tensor of that shape is a matrix, or a stack of them."""
    return len(shape) == 2 or (len(shape) == 3 and min(shape[1:]) >= KERNEL)  # noqa: PLR2004


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes that a method holds for a matrix beside blocks and a turned result.

    Attributes:
        finding: at most while `merge` works.
        keeping: what the function that it returns needs.
    """

    finding: int
    keeping: int


def held_bytes(
    told: Callable[[int, int, int, Mapping[str, Any]], Held],
    *,
    turned: Callable[[int, int, int, Mapping[str, Any]], bool] = lambda r, c, *_: r < c,
) -> Callable[[Mapping[str, Any], tuple[int, ...], int, int], int]:
    """Return what tells the plan the bytes that a method holds.

    Args:
        told: from rows, columns, the number of models and the values.
        turned: as for `merged_matrices`, from the values as well.
    """

    def holds(values: Mapping[str, Any], shape: tuple[int, ...], models: int, width: int) -> int:
        rules = {name: values[name] for name in ("others", "embeddings", "place")}
        if rule_of(shape, **rules) != "svd":
            return (models + 4) * _block_bytes(prod(shape), prod(shape[1:]))
        rows, columns = shape[-2:]
        across = turned(rows, columns, models, values)
        held = told(rows, columns, models, values)
        result = rows * columns * width if across else 0
        block = _block_bytes(rows * columns, rows if across else columns)
        return (2 * models + KEPT) * block + max(held.finding, held.keeping + result)

    return holds


def _block_bytes(numel: int, width: int) -> int:
    return 8 * min(max(BLOCK, width), numel)


def _averaged(
    base: Tensor, models: Sequence[Tensor], rule: str, weight: Sequence[float], scale: float
) -> Iterator[Tensor]:
    from torch import float64

    if not len(base.shape):
        base, models = base[...].reshape(1), [model[...].reshape(1) for model in models]
    scale *= {"mean": 1 / len(models), "sum": 1.0, "base": 0.0}[rule]
    step = max(BLOCK // max(prod(base.shape[1:]), 1), 1)
    for at in range(0, base.shape[0], step):
        own, *others = [t[at : at + step].to(float64, copy=True) for t in (base, *models)]
        deltas = [(p - own) * w for p, w in zip(others, weight, strict=True)]
        yield own.sub_(total(deltas).mul_(-scale).add_(0.0)).to(base.dtype)


def _written(vectors: Vectors, merged: Merged, scale: float) -> Iterator[Tensor]:
    import torch

    kind, out = vectors.base.dtype, None
    if vectors.turned:
        out = torch.empty(tuple(vectors.base.shape), dtype=kind)
    for start, end in vectors.places():
        # Minus plus zero leaves a base of -0.0 as it is; plus zero would not.
        change = merged(vectors.block(start, end)).mul_(-scale).add_(0.0)
        found = vectors.cut(vectors.base, start, end).sub_(change)
        if out is None:
            yield found.to(kind)
        else:
            out[:, start:end] = found.T
    if out is not None:
        yield out
