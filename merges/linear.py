"""Weighted average."""

from collections.abc import Sequence
from typing import Annotated

from merges.stages.blend import blended
from merges.stages.weights import check_shares, shares
from surgery.method import Param, PerModel, Tensor, merge


@merge(source="https://arxiv.org/abs/2203.05482", elementwise=True, plain=True, check=check_shares)
def linear(
    models: Sequence[Tensor],
    *,
    weight: Annotated[PerModel[float], Param("share of each model")],
    normalize: Annotated[bool, Param("divide by the sum of the weights")] = True,
) -> Tensor:
    r"""Average the models, each by its weight; with equal weights, the uniform soup.

    $$W = \frac{\sum_i w_i W_i}{\sum_i w_i}$$

    Shapes: all equal, any.

    Raises:
        RecipeError: `normalize` with weights that sum to zero.

    Source: "Model soups", arXiv 2203.05482, section 2.
    """
    return blended(models, shares(weight, normalize=normalize))
