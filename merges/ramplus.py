"""Reinforced agent merging with unique changes reinforced, by the overlap of whole models."""

from collections.abc import Sequence
from operator import add
from typing import Annotated, Any

from merges.stages.overlap import boosts, overlaps, reinforced
from surgery.method import Param, Tensor, merge
from surgery.passes import Each, Passes


@merge(source="https://arxiv.org/abs/2601.13572", groups=lambda _: ("overlap",))
def ramplus(
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

    with $S_j$ the models that changed weight j, and j running over all tensors that are merged.

    Shapes: all equal, any.

    Source: RAM+, arXiv 2601.13572. mergekit 0.1.5 has `ramplus_tl` only, tensor by tensor.
    """
    del base, models  # shapes only; every pass sees slices
    found, _ = yield Each(
        lambda x: overlaps(x.deltas, epsilon), fold=add, group="overlap", combine=_all
    )
    factors = boosts(found, r, alpha)
    return lambda x: reinforced(x.base, x.deltas, epsilon, factors)


def _all(tensors: list[list[Any]]) -> Any:  # noqa: ANN401 - a numpy array
    return sum(one for (one,) in tensors)
