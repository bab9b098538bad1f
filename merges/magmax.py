"""The largest change of each weight."""

from collections.abc import Sequence
from typing import Annotated

from merges.stages.pick import pick
from surgery.method import Param, Tensor, merge


@merge(source="https://arxiv.org/abs/2407.06322", elementwise=True)
def magmax(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    lambda_: Annotated[float, Param("scale of the merged task vector")] = 0.5,
) -> Tensor:
    r"""Take of each weight the change that is largest in magnitude, times `lambda`.

    $$W = W_0 + \lambda\, d_m, \quad m = \arg\max_i |d_i|, \quad d_i = W_i - W_0$$

    element by element; of equal magnitudes the later model's.

    Shapes: all equal, any.

    Source: MagMax, arXiv 2407.06322; ties and the default 0.5 as in its authors' code.
    """
    import numpy as np
    import torch

    largest = (models[0] - base).numpy()
    for model in models[1:]:
        change = (model - base).numpy()
        largest = pick(np.abs(change) >= np.abs(largest), change, largest)
    return torch.add(base, torch.from_numpy(largest), alpha=lambda_)
