"""Isotropic merging in the common and in task-specific subspaces."""

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

from merges.stages.matrices import (
    ONE,
    Merged,
    Others,
    Tolerance,
    Vectors,
    Vocabulary,
    check_lines,
    held_bytes,
    layered,
    merged_matrices,
    rule_of,
    total,
)
from merges.stages.parameters import Lambda, LinesAlpha, LinesBeta, Weight
from merges.stages.recombine import recombined, recombining
from merges.stages.spectrum import gram, spectrum
from surgery.method import Param, Place, Tensor, merge


@merge(
    source="https://arxiv.org/abs/2502.04959",
    holds=held_bytes(lambda rows, columns, *_: recombining(min(rows, columns))),
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
    vocabulary: Vocabulary = "mean",
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
    heads are averaged unless `vocabulary` is svd.

    Source: "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific
    Subspaces", arXiv 2502.04959, section 4.2, algorithm 1.
    """

    def combined(vectors: Vectors) -> Merged:
        from torch import cat

        own = _own(vectors.width, len(models), common)
        sums = (total(block) for block in vectors.blocks())
        first = spectrum(
            gram(sums, vectors.width), tolerance, most=vectors.width - own * len(models)
        )
        find = _turned if vectors.turned else _straight
        lefts, parts = [], []
        for n in range(len(models)):
            left, values, right = find(vectors, n, first, own, tolerance)
            lefts.append(left)
            parts.append((values, right))
        values = cat([*(values for values, _ in parts), first[0]])

        def left(block: list[Tensor]) -> Tensor:
            joint = sum(block[1:], block[0]) @ (first[1] / first[0])
            return cat([*(f(d, joint) for f, d in zip(lefts, block, strict=True)), joint], dim=1)

        flat = values.mean().expand(values.numel())
        rights = [*(right for _, right in parts), first[1]]
        return recombined(vectors, left, rights, flat, tolerance)

    rule = rule_of(base.shape, others=others, vocabulary=vocabulary, place=place)
    scale = layered(lambda_, lines_alpha=lines_alpha, lines_beta=lines_beta, place=place)
    return merged_matrices(base, models, combined, weight=weight, scale=scale, rule=rule)


def _own(size: int, models: int, common: float) -> int:
    """Return how many directions each task adds."""
    return min(round((size - int(size * common)) / models), size // models)


Common = tuple[Tensor, Tensor]  # singular values and right singular vectors of the sum
Own = tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]


def _straight(vectors: Vectors, n: int, first: Common, most: int, tolerance: float) -> Own:
    """Return a task's left vectors by block, singular values and right vectors.

    Rows are the long side: what is common is taken off blocks by its projection there,
    X = U_c^T d, and off the Gram matrix by X^T X.
    """
    import torch

    size, joint_right = vectors.width, first[1] / first[0]
    own = torch.zeros(size, size, dtype=torch.float64)
    shared = torch.zeros(first[0].numel(), size, dtype=torch.float64)
    for block in vectors.blocks():
        delta = block[n].clone()
        own.addmm_(delta.T, delta)
        shared.addmm_((total(block) @ joint_right).T, delta)
    largest = _largest(own)
    own.addmm_(shared.T, shared, alpha=-1)
    values, right = spectrum(own, tolerance, most=most, largest=largest)
    off = shared @ (right / values)
    return (lambda d, joint: d @ (right / values) - joint @ off), values, right


def _turned(vectors: Vectors, n: int, first: Common, most: int, tolerance: float) -> Own:
    """Return the same where rows are the short side: U_c are the sum's vectors of that side."""
    joint = first[1]
    own = gram((delta for (delta,) in vectors.blocks([n])), vectors.width)
    largest = _largest(own)
    own -= joint @ (joint.T @ own)
    own -= (own @ joint) @ joint.T
    values, right = spectrum((own + own.T) / 2, tolerance, most=most, largest=largest)
    return (lambda d, _: d @ (right / values)), values, right


def _largest(own: Tensor) -> float:
    """Return the square of a task vector's largest singular value."""
    from torch.linalg import eigvalsh

    finite = own.numel() and bool(own.isfinite().all())
    return float(eigvalsh(own)[-1]) if finite else 0.0
