"""Exponential moving average of checkpoints."""

from collections.abc import Sequence
from typing import Annotated

from merges.stages.blend import plain_blend
from surgery.method import Param, Tensor, merge


@merge(source="https://arxiv.org/abs/2411.18704", elementwise=True, plain=True)
def ema(
    models: Sequence[Tensor],
    *,
    decay: Annotated[float, Param("what each step keeps of the average so far", ge=0, lt=1)] = 0.9,
) -> Tensor:
    r"""Average the checkpoints of a training run, the newer the more.

    $$E_0 = W_0, \quad E_j = d\,E_{j-1} + (1 - d)\,W_j, \quad W = E_n$$

    Models are given from the oldest to the newest. The average starts at the oldest, without
    correction for it: of few checkpoints that one has the largest share, $d^n$.

    Shapes: all equal, any.

    Source: Morales-Brotons et al., "Exponential moving average of weights in deep learning",
    arXiv 2411.18704, on checkpoints instead of steps.
    """
    steps = range(len(models) - 1, 0, -1)
    shares = [(1 - decay) * decay ** (n - 1) for n in steps]
    return plain_blend(models, [1 - sum(shares), *shares])
