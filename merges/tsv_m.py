"""Task singular vectors, merged."""

from collections.abc import Iterator, Sequence

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
from surgery.method import Place, Tensor, merge


@merge(
    source="https://arxiv.org/abs/2412.00081",
    holds=held_bytes(lambda rows, columns, *_: recombining(min(rows, columns))),
    check=check_lines,
)
def tsv_m(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weight = ONE,
    lambda_: Lambda = 1.0,
    tolerance: Tolerance = 1e-5,
    others: Others = "mean",
    vocabulary: Vocabulary = "mean",
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
    `vocabulary` is svd.

    Source: "Task Singular Vectors: Reducing Task Interference in Model Merging",
    arXiv 2412.00081, section 4.2, algorithm 1.
    """

    def combined(vectors: Vectors) -> Merged:
        from torch import cat, split

        count = len(models)
        most = vectors.width // count
        if not most:
            return lambda block: total(block) / count
        parts = [_first(vectors, n, most, tolerance) for n in range(count)]
        values, right = cat([s for s, _ in parts]), cat([own for _, own in parts], dim=1)
        own = split(right, [s.numel() for s, _ in parts], dim=1)
        del parts

        def left(block: list[Tensor]) -> Tensor:
            return cat([d @ v for d, v in zip(block, own, strict=True)], dim=1) / values

        return recombined(vectors, left, right, values, tolerance)

    rule = rule_of(base.shape, others=others, vocabulary=vocabulary, place=place)
    scale = layered(lambda_, lines_alpha=lines_alpha, lines_beta=lines_beta, place=place)
    return merged_matrices(base, models, combined, weight=weight, scale=scale, rule=rule)


def _first(vectors: Vectors, model: int, most: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return a task vector's largest singular values and right singular vectors."""
    own = gram((delta for (delta,) in vectors.blocks([model])), vectors.width)
    return spectrum(own, tolerance, most=most)
