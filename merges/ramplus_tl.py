"""Reinforced agent merging with unique changes reinforced, by the overlap of each tensor."""

from collections.abc import Sequence
from operator import add
from typing import Annotated

from merges.stages.overlap import boosts, overlaps, reinforced
from surgery.method import Param, Tensor, merge
from surgery.passes import Each, Passes


@merge(source="https://arxiv.org/abs/2601.13572")
def ramplus_tl(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    epsilon: Annotated[float, Param("changes up to this count as none", ge=0)] = 1e-5,
    r: Annotated[float, Param("how strongly overlap reinforces", ge=0)] = 0.1,
    alpha: Annotated[float, Param("overlap counts up to this", ge=0)] = 0.2,
) -> Passes:
    r"""Merge as ram does, and multiply a change that only model i made by a factor of its own.

    $$\lambda_i = 1 + r \min(\rho_i, \alpha), \quad \rho_i =
    \frac{|\{j : |d_{ij}| > \epsilon,\ |S_j| > 1\}|}{|\{j : |d_{ij}| > \epsilon,\ |S_j| = 1\}|}$$

    with $S_j$ the models that changed weight j, and j running over the tensor.

    Shapes: all equal, any.

    Source: mergekit 0.1.5, a variant of RAM+ (arXiv 2601.13572): the paper's j runs over the
    whole model, which is `ramplus` here.
    """
    del base, models  # shapes only; every pass sees slices
    (found,) = yield Each(lambda x: overlaps(x.deltas, epsilon), fold=add)
    factors = boosts(found, r, alpha)
    return lambda x: reinforced(x.base, x.deltas, epsilon, factors)
