"""Feature maps: functions of queries and of keys whose product stands for exp of their product.

Axis letters: b rows, h KV heads, r query heads a KV head, t tokens, d head width, f features.
"""

from collections.abc import Callable

import torch
from torch import Tensor

FORMAT = 1  # of what checkpoints hold; a change that old ones do not follow counts it up
LEAST = 1e-12  # no feature is below, so that no sum of weights is 0


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply every head by a matrix of its own; keys meet that of each query head.

    Shapes: x [b, h, r or 1, t, d], weight [h r, d, f], bias [h r, 1, f]; [b, h, r, t, f], in
    float32 (float64 where x is).
    """
    h, r = x.shape[1:3]
    weight = weight.to(x.dtype).reshape(h, -1, *weight.shape[1:])
    if r == 1:
        y = torch.einsum("bhtd,hrdf->bhrtf", x[:, :, 0], weight)
    else:
        y = torch.einsum("bhrtd,hrdf->bhrtf", x, weight)
    y = y.to(torch.promote_types(x.dtype, torch.float32))
    return y if bias is None else y + bias.to(y.dtype).reshape(h, -1, *bias.shape[1:])


def softmax_map(y: Tensor) -> Tensor:
    """Softmax over features of y and of -y, side by side.

    Source: LoLCATs, arXiv 2410.10254, appendix A; `softmax_dim` of its code.
    """
    return torch.cat((y.softmax(-1), (-y).softmax(-1)), -1).clamp(min=LEAST)


def exp_map(y: Tensor) -> Tensor:
    """Exponentials of y and of -y, side by side, the largest of each half 1.

    Source: Hedgehog, arXiv 2402.04347, equation 3, scaled as `exp_dim` of the LoLCATs code is: a
    query's scale cancels out, a key's does not.
    """
    high, low = y.amax(-1, keepdim=True), y.amin(-1, keepdim=True)
    return torch.cat(((y - high).exp(), (low - y).exp()), -1).clamp(min=LEAST)


def relu_map(y: Tensor) -> Tensor:
    """What is above 0.

    Source: T2R, arXiv 2103.13076, equation 3.
    """
    return y.clamp(min=LEAST)


def taylor_map(y: Tensor) -> Tensor:
    """Products of entries up to the second order: 1 + s + s^2/2 for a product s of two inputs.

    Shapes: [..., f] to [..., 1 + f + f (f + 1) / 2]; a pair of entries is there once.

    Source: Based, arXiv 2402.18668, section 4.1, where a pair is there twice.
    """
    f = y.shape[-1]
    first, second = torch.triu_indices(f, f, 1, device=y.device)
    pairs = y[..., first] * y[..., second]
    return torch.cat((torch.ones_like(y[..., :1]), y, pairs, y.square() * 2**-0.5), -1)


MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": softmax_map,
    "exp": exp_map,
    "relu": relu_map,
    "taylor": taylor_map,
}
