"""Isotropic merging in the common subspace."""

from collections.abc import Iterator, Sequence

from merges.stages.matrices import (
    EACH,
    Merged,
    Others,
    Scale,
    Tolerance,
    Vectors,
    Vocabulary,
    Weight,
    held_bytes,
    merged_matrices,
    rule_of,
    total,
)
from merges.stages.spectrum import eigh_bytes, gram, spectrum
from surgery.method import Place, Tensor, merge


@merge(
    source="https://arxiv.org/abs/2502.04959",
    holds=held_bytes(lambda _, short, *__: eigh_bytes(short)),
)
def iso_c(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weight = EACH,
    lambda_: Scale = 1.0,
    tolerance: Tolerance = 1e-5,
    others: Others = "mean",
    vocabulary: Vocabulary = "mean",
    place: Place,
) -> Iterator[Tensor]:
    r"""Give all singular values of the sum of the task vectors their mean.

    $$W = W_0 + \lambda\,\bar\sigma\,U V^\top, \quad \sum_i w_i (W_i - W_0) = U \Sigma V^\top,
    \quad \bar\sigma = \operatorname{mean} \sigma_r$$

    Shapes: [rows, columns]; experts [experts, rows, columns] one by one.

    Deviations: the mean is over the singular values that are not zero, and only their directions
    get it; the authors give arbitrary directions of the null space the mean over all. Embeddings
    and heads are averaged, unless `vocabulary` tells otherwise (see decision 030).

    Source: "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific
    Subspaces", arXiv 2502.04959, section 4.1, algorithm 1.
    """

    def flattened(vectors: Vectors) -> Merged:
        sums = (total(block) for block in vectors.blocks())
        values, right = spectrum(gram(sums, vectors.short), tolerance)
        factor = (right * (values.mean() / values)) @ right.T
        return lambda block: total(block) @ factor

    rule = rule_of(base.shape, others=others, vocabulary=vocabulary, place=place)
    return merged_matrices(base, models, flattened, weight=weight, scale=lambda_, rule=rule)
