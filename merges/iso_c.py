"""Isotropic merging in the common subspace."""

from collections.abc import Iterator, Sequence

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
from merges.stages.spectrum import DECOMPOSING, gram, spectrum, squares
from surgery.method import Place, Tensor, merge


def _held(rows: int, columns: int, *_: object) -> Held:
    side = min(rows, columns)
    return Held(squares(DECOMPOSING, side), squares(1, side))


@merge(source="https://arxiv.org/abs/2502.04959", holds=held_bytes(_held), check=check_lines)
def iso_c(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weight = ONE,
    lambda_: Lambda = 1.0,
    tolerance: Tolerance = 1e-5,
    others: Others = "mean",
    embeddings: Embeddings = "mean",
    lines_alpha: LinesAlpha = None,
    lines_beta: LinesBeta = None,
    place: Place,
) -> Iterator[Tensor]:
    r"""Give all singular values of the sum of the task vectors their mean.

    $$W = W_0 + \lambda\,\bar\sigma\,U V^\top, \quad \sum_i w_i (W_i - W_0) = U \Sigma V^\top,
    \quad \bar\sigma = \operatorname{mean} \sigma_r$$

    Shapes: [rows, columns]; experts [experts, rows, columns] one by one.

    Deviations: the mean is over the singular values that are not zero, and only their directions
    get it; the authors' code gives it to arbitrary directions of the null space as well.
    Embeddings and heads are averaged unless `embeddings` is svd.

    Source: "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific
    Subspaces", arXiv 2502.04959, section 4.1.
    """

    def flattened(vectors: Vectors) -> Merged:
        sums = (total(block) for block in vectors.blocks())
        values, right = spectrum(gram(sums, vectors.width), tolerance)
        factor = (right * (values.mean() / values)) @ right.T
        return lambda block: total(block) @ factor

    rule = rule_of(base.shape, others=others, embeddings=embeddings, place=place)
    scale = layered(lambda_, lines_alpha=lines_alpha, lines_beta=lines_beta, place=place)
    return merged_matrices(base, models, flattened, weight=weight, scale=scale, rule=rule)
