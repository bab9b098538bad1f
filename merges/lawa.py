"""Latest weight averaging: the mean of the newest checkpoints."""

from collections.abc import Sequence
from typing import Annotated

from merges.stages.blend import plain_blend
from surgery.method import Param, Tensor, merge


@merge(source="https://arxiv.org/abs/2209.14981", elementwise=True, plain=True)
def lawa(
    models: Sequence[Tensor],
    *,
    last: Annotated[int | None, Param("how many of the newest; all by default", ge=1)] = None,
) -> Tensor:
    r"""Average the newest checkpoints of a training run, each with the same weight.

    $$W = \frac{1}{k} \sum_{j=n-k+1}^{n} W_j$$

    Models are given from the oldest to the newest; $k$ is `last`, or all where there are fewer.

    Shapes: all equal, any.

    Source: Kaddour, "Stop wasting my time!", arXiv 2209.14981.
    """
    newest = models[-last:] if last else models
    return plain_blend(newest, [1 / len(newest)] * len(newest))
