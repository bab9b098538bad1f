"""Warmup-stable-merge: a learning rate's decay, made afterwards from checkpoints."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Literal

from merges.stages.blend import plain_blend
from surgery.method import Param, Tensor, merge

Curve = Literal["linear", "cosine", "1-sqrt"]
CURVES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}


@merge(source="https://arxiv.org/abs/2507.17634", elementwise=True, plain=True)
def wsm(
    models: Sequence[Tensor],
    *,
    curve: Annotated[Curve, Param("the decay that the average stands for")] = "1-sqrt",
    last: Annotated[int | None, Param("how many of the newest; all by default", ge=1)] = None,
) -> Tensor:
    r"""Average the checkpoints of a run at constant rate as if the rate had decayed over them.

    $$W = \sum_{j=0}^{k} c_j W_j, \quad c_0 = 1 - w_1, \quad c_j = w_j - w_{j+1}, \quad c_k = w_k,
    \quad w_i = f\Big(\frac{i}{k+1}\Big)$$

    where $w_i$ is the share that the updates between $W_{i-1}$ and $W_i$ keep, and $f$ falls
    from 1 to 0: $1 - x$ (the uniform average), $(1 + \cos \pi x) / 2$ or $1 - \sqrt{x}$. Models
    are given from the oldest to the newest, at equal distances; `last` takes the newest only.

    Shapes: all equal, any.

    Source: WSM, arXiv 2507.17634, theorem on decay and merging. It leaves open where on the curve
    the checkpoints stand: here the curve reaches 0 one step behind the newest, so that all count.
    """
    newest = models[-last:] if last else models
    count, fall = len(newest), CURVES[curve]
    kept = [1.0, *(fall(n / count) for n in range(1, count)), 0.0]
    return plain_blend(newest, [a - b for a, b in pairwise(kept)])
