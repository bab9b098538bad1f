"""Task singular vectors, merged."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

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
from merges.stages.sketch import leading, leading_bytes
from merges.stages.spectrum import gram, spectrum, squares
from surgery.method import Param, Place, Tensor, merge


def _held(rows: int, columns: int, models: int, values: Mapping[str, Any]) -> Held:
    held, side = recombining(min(rows, columns)), min(rows, columns)
    if values["svd"] == "exact":
        return held
    sketched = leading_bytes((max(rows, columns), side), side // models) + squares(1, side)
    return Held(max(held.finding + squares(0.5, side), sketched), held.keeping)


@merge(
    source="https://arxiv.org/abs/2412.00081",
    holds=held_bytes(_held),
    check=check_lines,
)
def tsv_m(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weight = ONE,
    lambda_: Lambda = 1.0,
    svd: Annotated[
        Literal["exact", "randomized"],
        Param("of each task vector; a sketch is faster from four models on"),
    ] = "exact",
    tolerance: Tolerance = 1e-5,
    others: Others = "mean",
    embeddings: Embeddings = "mean",
    lines_alpha: LinesAlpha = None,
    lines_beta: LinesBeta = None,
    place: Place,
) -> Iterator[Tensor]:
    r"""Merge the first singular vectors of the task vectors, made orthogonal across tasks.

    $$W = W_0 + \lambda\,\hat U \operatorname{diag}(\sigma_{11}, \ldots, \sigma_{Tk}) \hat V^\top,
    \quad k = \lfloor \min(m, n) / T \rfloor$$

    Each task vector gives its k largest singular values and their vectors; the hats stand for
    the polar factors of the vectors of all tasks side by side.

    Shapes: [rows, columns]; experts [experts, rows, columns] one by one.

    Deviations: where tasks share directions, the polar factors are those on the range; the
    authors' SVD fills up with arbitrary directions. A matrix with fewer singular values than
    models is averaged (the authors drop its change). Embeddings and heads are averaged unless
    `embeddings` is svd.

    Source: "Task Singular Vectors: Reducing Task Interference in Model Merging",
    arXiv 2412.00081, section 4.2, algorithm 1.
    """

    def combined(vectors: Vectors) -> Merged:
        from torch import cat, split

        count = len(models)
        most = vectors.width // count
        if not most:
            return lambda block: total(block) / count
        first = _sketched(vectors, place) if svd == "randomized" else _decomposed(vectors)
        parts = [first(n, most, tolerance) for n in range(count)]
        values, right = cat([s for s, _ in parts]), cat([own for _, own in parts], dim=1)
        own = split(right, [s.numel() for s, _ in parts], dim=1)
        del parts

        def left(block: list[Tensor]) -> Tensor:
            return cat([d @ v for d, v in zip(block, own, strict=True)], dim=1) / values

        return recombined(vectors, left, right, values, tolerance)

    rule = rule_of(base.shape, others=others, embeddings=embeddings, place=place)
    scale = layered(lambda_, lines_alpha=lines_alpha, lines_beta=lines_beta, place=place)
    return merged_matrices(base, models, combined, weight=weight, scale=scale, rule=rule)


First = Callable[[int, int, float], tuple[Tensor, Tensor]]


def _decomposed(vectors: Vectors) -> First:
    """Return what gives a task vector's first singular values and right singular vectors."""

    def first(n: int, most: int, tolerance: float) -> tuple[Tensor, Tensor]:
        own = gram((delta for (delta,) in vectors.blocks([n])), vectors.width)
        return spectrum(own, tolerance, most=most)

    return first


def _sketched(vectors: Vectors, place: Place) -> First:
    shape = (max(vectors.base.shape), vectors.width)

    def first(n: int, most: int, tolerance: float) -> tuple[Tensor, Tensor]:
        def read() -> Iterator[Tensor]:
            return (delta for (delta,) in vectors.blocks([n]))

        return leading(read, shape, most, tolerance=tolerance, place=place, part=n)

    return first
