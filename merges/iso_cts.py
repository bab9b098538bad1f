"""Isotropic merging in the common and in task-specific subspaces."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

from merges.stages.matrices import (
    ONE,
    Embeddings,
    Held,
    Merged,
    Others,
    Tolerance,
    Vectors,
    check_lines,
    held_bytes,
    layered,
    merged_matrices,
    rule_of,
    total,
)
from merges.stages.parameters import Lambda, LinesAlpha, LinesBeta, Weight
from merges.stages.recombine import recombined, recombining
from merges.stages.spectrum import gram, spectrum, squares
from surgery.method import Param, Place, Tensor, merge


def _held(rows: int, columns: int, *_: object) -> Held:
    held, side = recombining(min(rows, columns)), min(rows, columns)
    return Held(held.finding + squares(0.2, side), held.keeping)


@merge(
    source="https://arxiv.org/abs/2502.04959",
    holds=held_bytes(_held),
    check=check_lines,
)
def iso_cts(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weight = ONE,
    lambda_: Lambda = 1.0,
    common: Annotated[float, Param("share of the directions taken from the sum", ge=0, le=1)] = 0.8,
    tolerance: Tolerance = 1e-5,
    others: Others = "mean",
    embeddings: Embeddings = "mean",
    lines_alpha: LinesAlpha = None,
    lines_beta: LinesBeta = None,
    place: Place,
) -> Iterator[Tensor]:
    r"""Add task-specific directions to the common ones, all with the same singular value.

    $$W = W_0 + \lambda\,\bar\sigma\,\hat U \hat V^\top, \quad
    \Delta_i - U_c U_c^\top \Delta_i = U_i \Sigma_i V_i^\top$$

    U_c are the first left singular vectors of the sum of the task vectors. The hats stand for
    the polar factors of [U_1 .. U_T U_c] and [V_1 .. V_T V_c], each task with the first of its
    singular vectors, and the mean is over the singular values of all these.

    Shapes: [rows, columns]; experts [experts, rows, columns] one by one. The task vectors share
    the directions that are not common equally, rounded as the authors do.

    Deviations: directions of singular value zero are left out, as in `iso_c`. Embeddings and
    heads are averaged unless `embeddings` is svd.

    Source: "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific
    Subspaces", arXiv 2502.04959, section 4.2, algorithm 1.
    """

    def combined(vectors: Vectors) -> Merged:
        from torch import cat

        own = _own(vectors.width, len(models), common)
        sums = gram((total(block) for block in vectors.blocks()), vectors.width)
        first = spectrum(sums, tolerance, most=vectors.width - own * len(models))
        del sums
        find = _turned if vectors.turned else _straight
        parts = [find(vectors, n, first, own, tolerance) for n in range(len(models))]
        values = cat([*(part.values for part in parts), first[0]])
        right = cat([*(part.right for part in parts), first[1]], dim=1)
        left = _left(parts, values, right)
        del parts, first
        return recombined(vectors, left, right, values.mean().expand_as(values), tolerance)

    rule = rule_of(base.shape, others=others, embeddings=embeddings, place=place)
    scale = layered(lambda_, lines_alpha=lines_alpha, lines_beta=lines_beta, place=place)
    return merged_matrices(base, models, combined, weight=weight, scale=scale, rule=rule)


def _own(size: int, models: int, common: float) -> int:
    """Return how many directions each task adds."""
    return min(round((size - int(size * common)) / models), size // models)


Common = tuple[Tensor, Tensor]  # singular values and right singular vectors of the sum


@dataclass(frozen=True, slots=True)
class _Own:
    """What a task adds: singular values [own], right singular vectors [width, own].

    Attributes:
        off: [common, own], the common left vectors' part in its left vectors, to be taken off;
            none where the right ones are orthogonal to them already.
    """

    values: Tensor
    right: Tensor
    off: Tensor | None


def _left(parts: Sequence[_Own], values: Tensor, right: Tensor) -> Callable[[list[Tensor]], Tensor]:
    """Return what gives a block of all left vectors, those of the tasks first."""
    from torch import cat, split

    offs = [part.off for part in parts]
    counts = [part.values.numel() for part in parts]
    counts.append(values.numel() - sum(counts))
    sizes, sides = split(values, counts), split(right, counts, dim=1)

    def left(block: list[Tensor]) -> Tensor:
        joint = sum(block[1:], block[0]) @ sides[-1] / sizes[-1]
        every = [d @ v / s for d, v, s in zip(block, sides[:-1], sizes[:-1], strict=True)]
        for one, off in zip(every, offs, strict=True):
            if off is not None:
                one.addmm_(joint, off, alpha=-1)
        return cat([*every, joint], dim=1)

    return left


def _straight(vectors: Vectors, n: int, first: Common, most: int, tolerance: float) -> _Own:
    """Find what a task adds where rows are the long side.

    What is common is taken off blocks by its projection there, X = U_c^T d, and off the Gram
    matrix by X^T X.
    """
    import torch

    size, common = vectors.width, first[0].numel()
    own = torch.zeros(size, size, dtype=torch.float64)
    shared = torch.zeros(common, size, dtype=torch.float64)
    for block in vectors.blocks():
        delta = block[n].clone()
        own.addmm_(delta.T, delta)
        shared.addmm_((total(block) @ first[1] / first[0]).T, delta)
    largest = _largest(own)
    own.addmm_(shared.T, shared, alpha=-1)
    values, right = spectrum(own, tolerance, most=most, largest=largest)
    return _Own(values, right, shared @ (right / values))


def _turned(vectors: Vectors, n: int, first: Common, most: int, tolerance: float) -> _Own:
    """Find the same where rows are the short side: U_c are the sum's vectors of that side."""
    joint = first[1]
    own = gram((delta for (delta,) in vectors.blocks([n])), vectors.width)
    largest = _largest(own)
    own -= joint @ (joint.T @ own)
    own -= (own @ joint) @ joint.T
    values, right = spectrum((own + own.T) / 2, tolerance, most=most, largest=largest)
    return _Own(values, right, None)


def _largest(own: Tensor) -> float:
    """Return the square of a task vector's largest singular value."""
    from torch.linalg import eigvalsh

    finite = own.numel() and math.isfinite(float(own.sum()))
    return float(eigvalsh(own)[-1]) if finite else 0.0
