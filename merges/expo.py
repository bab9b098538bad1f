"""Model extrapolation: further in the direction of alignment."""

from typing import Annotated

from surgery.method import Param, Tensor, merge


@merge(source="https://arxiv.org/abs/2404.16792", elementwise=True, plain=True)
def expo(
    base: Tensor,
    aligned: Tensor,
    *,
    alpha: Annotated[float, Param("how far beyond the aligned model")] = 0.3,
) -> Tensor:
    r"""Extrapolate from a fine-tuned model, the base, through its aligned successor.

    $$W = W_1 + \alpha\,(W_1 - W_0)$$

    Shapes: equal, any. The same as task_arithmetic with weight $1 + \alpha$.

    Source: ExPO, arXiv 2404.16792, equation 2: $W_0$ is the SFT model, $W_1$ the one after DPO
    or RLHF. The best $\alpha$ was found by search, 0.3 to 0.5 for most models; it has no default
    there.
    """
    return aligned + (aligned - base) * alpha
