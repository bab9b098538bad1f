"""Model breadcrumbs with sign election."""

from collections.abc import Sequence
from math import prod

from merges.stages.combine import agreed
from merges.stages.layers import added
from merges.stages.outliers import Gamma, Scope, by_rows, without_outliers
from merges.stages.parameters import (
    Density,
    Divide,
    Elect,
    Lambda,
    LinesAlpha,
    LinesBeta,
    Normalize,
    Rescale,
    Weight,
    groups,
)
from merges.stages.rescale import rescaled
from surgery.method import Place, Tensor, merge
from surgery.passes import Passes


@merge(
    source="https://arxiv.org/abs/2312.06795",
    plain=True,
    rows=by_rows,
    ignored=("int8_mask",),
    groups=groups,
)
def breadcrumbs_ties(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weight,
    density: Density = 1.0,
    gamma: Gamma = 0.01,
    scope: Scope = "tensor",
    rescale: Rescale = "none",
    elect: Elect = "weighted",
    divide: Divide = "weights",
    normalize: Normalize = False,
    lambda_: Lambda = 1.0,
    lines_alpha: LinesAlpha = None,
    lines_beta: LinesBeta = None,
    place: Place,
) -> Passes:
    r"""Drop the largest and the smallest magnitudes of task vectors, and add what agrees in sign.

    $$W = W_0 + \lambda \sum_{i \in A} w_i \hat\tau_i, \quad \hat\tau_i = \tau_i \odot
    [\,\gamma_i < \mathrm{rank}(|\tau_i|) \le \gamma_i + \rho_i\,], \quad \tau_i = W_i - W_0$$

    Shapes: all equal, any. The density wins where the two do not fit together: no more outliers
    are dropped than there are elements that are not kept. Numbers are rounded down; of equal
    magnitudes the lower index is taken for larger.

    Deviation: the authors cut every row of the last axis (scope: row, where a row is all axes
    behind the first); the default cuts the tensor, as the recipes expect.

    Source: "Model Breadcrumbs", arXiv 2312.06795, section 3; signs as in TIES, arXiv 2306.01708.
    """
    vectors = yield from without_outliers(base, density, gamma, scope=scope)
    vectors = yield from rescaled(vectors, rescale, density, prod(base.shape))
    del models
    combined = agreed(vectors, weight, normalize=normalize, elect=elect, divide=divide)
    return (
        yield from added(
            combined, scale=lambda_, lines_alpha=lines_alpha, lines_beta=lines_beta, place=place
        )
    )
