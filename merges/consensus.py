"""Consensus merging: what matters to several tasks is kept, the rest is dropped."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from merges.stages.layers import added
from merges.stages.localized import added_up, localized
from merges.stages.parameters import LinesAlpha, LinesBeta, groups
from surgery.errors import RecipeError
from surgery.method import Param, PerModel, Place, Tensor, merge
from surgery.passes import Passes, Slices


def _check(values: Mapping[str, Any]) -> None:
    models = len(values["lambda_"])
    if values["k"] > models:
        fact = f"k {values['k']} asks for more tasks than the {models} models"
        raise RecipeError("k", fact, f"give at most {models}")


@merge(source="https://arxiv.org/abs/2405.07813", groups=groups, check=_check)
def consensus(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    lambda_: Annotated[
        PerModel[float], Param("how much a weight must matter to a task to be in its mask", ge=0)
    ] = 0.4,
    k: Annotated[int, Param("tasks that must agree on a weight", ge=0)] = 2,
    scale: Annotated[float, Param("factor of what is kept")] = 0.3,
    lines_alpha: LinesAlpha = None,
    lines_beta: LinesBeta = None,
    place: Place,
) -> Passes:
    r"""Add task vectors up, and keep only the weights that matter to at least k tasks.

    $$W = W_0 + \alpha\, m \odot \tau, \quad \tau = \sum_i \tau_i, \quad
    m = \Big[\sum_i m_i \ge k\Big], \quad m_i = [\,|\tau_i| > \lambda_i |\tau - \tau_i|\,]$$

    Shapes: all equal, any. The mask of a task, $m_i$, is its TALL mask; k = 0 keeps everything.
    The authors choose each lambda on held-out data from 0.2 to 0.6, and the scale as well; the
    defaults are the middle of the one and the usual value of the other.

    Raises:
        RecipeError: k is larger than the number of models.

    Source: "Localizing Task Information for Improved Model Merging and Compression", arXiv
    2405.07813, equation 5 and section 4.3; the mask is strict, as in the authors' code.
    """
    del base, models  # shapes only; every pass sees slices

    def combined(x: Slices) -> Tensor:
        deltas = x.deltas
        total = added_up(deltas)
        kept = [localized(d, total, bound) for d, bound in zip(deltas, lambda_, strict=True)]
        return total.mul_(added_up(kept).ge_(k))

    return (
        yield from added(
            combined, scale=scale, lines_alpha=lines_alpha, lines_beta=lines_beta, place=place
        )
    )
