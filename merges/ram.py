"""Reinforced agent merging: shared changes averaged, unique ones kept."""

from collections.abc import Sequence
from typing import Annotated

from merges.stages.overlap import reinforced
from surgery.method import Param, Tensor, merge


@merge(source="https://arxiv.org/abs/2601.13572", elementwise=True)
def ram(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    epsilon: Annotated[float, Param("changes up to this count as none", ge=0)] = 1e-5,
) -> Tensor:
    r"""Average each weight's change over those models that changed it.

    $$W = W_0 + \frac{\sum_{i \in S} d_i}{\max(1, |S|)}, \quad S = \{i : |d_i| > \epsilon\},
    \quad d_i = W_i - W_0$$

    element by element.

    Shapes: all equal, any.

    Source: RAM, arXiv 2601.13572; mergekit 0.1.5 is the same.
    """
    return reinforced(base, [model - base for model in models], epsilon)
