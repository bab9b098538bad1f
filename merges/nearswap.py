"""Take the other model's weights where they are near."""

from typing import Annotated

from surgery.method import Param, Tensor, merge


@merge(source="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001", elementwise=True)
def nearswap(
    base: Tensor,
    other: Tensor,
    *,
    t: Annotated[float, Param("how far a weight may move", ge=0)],
) -> Tensor:
    r"""Move each weight of the base towards the other model's, by `t` at most.

    $$W = w\,W_1 + (1-w)\,W_0, \quad w = \min\Big(1, \frac{t}{|W_0 - W_1|}\Big)$$

    which is $W_1$ held within $[W_0 - t,\, W_0 + t]$.

    Shapes: equal, any.

    Source: the model card of QuartetAnemoi-70B; mergekit 0.1.5, which takes differences below
    1e-6 for 1e-6: that only matters for `t` below 1e-6, where it moves such weights less.
    """
    import torch

    return torch.minimum(torch.maximum(other, base - t), base + t)
