"""A sum of task vectors whose singular values are calibrated."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from merges.stages.calibrate import calibrated, calibrating
from merges.stages.matrices import (
    ONE,
    Embeddings,
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
from surgery.method import Param, Place, Tensor, merge


@merge(source="https://arxiv.org/abs/2602.05536", holds=held_bytes(calibrating), check=check_lines)
def svc(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weight = ONE,
    lambda_: Lambda = 1.0,
    alpha: Annotated[float, Param("the least that a task may count for", gt=0)] = 0.1,
    factor: Annotated[
        Literal["paper", "code"],
        Param("of singular values: the paper's, or that of the authors' code"),
    ] = "paper",
    tolerance: Tolerance = 1e-5,
    others: Others = "sum",
    embeddings: Embeddings = "sum",
    lines_alpha: LinesAlpha = None,
    lines_beta: LinesBeta = None,
    place: Place,
) -> Iterator[Tensor]:
    r"""Add task vectors, and scale down the singular values of what several of them share.

    $$W = W_0 + \lambda\,U \operatorname{diag}(\gamma_r \sigma_r) V^\top, \quad
    \gamma_r = \frac{T}{\sum_i \max(\alpha, s_r^i)}, \quad
    s_r^i = \frac{\langle u_r^\top \Delta, u_r^\top \Delta_i \rangle}
    {\lVert u_r^\top \Delta_i \rVert^2}$$

    Delta is the sum of the task vectors times their weights, U diag(sigma) V^T its singular
    value decomposition. With `factor: code`, gamma is 1 where any s is not positive, and else
    the inverse of their mean, or of alpha if that is larger.

    Shapes: [rows, columns]; experts [experts, rows, columns] one by one.

    Deviations: a response below `tolerance` of its task vector's norm counts as none (s = 0).
    What is no matrix, and embeddings and heads, are plain sums, as the authors leave them.

    Source: "When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging",
    arXiv 2602.05536, equations 8 and 9, algorithm 1.
    """

    def calibrate(vectors: Vectors) -> Merged:
        return calibrated(
            vectors, total, len(models), alpha=alpha, factor=factor, tolerance=tolerance
        )

    rule = rule_of(base.shape, others=others, embeddings=embeddings, place=place)
    scale = layered(lambda_, lines_alpha=lines_alpha, lines_beta=lines_beta, place=place)
    return merged_matrices(base, models, calibrate, weight=weight, scale=scale, rule=rule)
