"""What a mixer of a linearized attention layer gets and keeps.

Axis letters: b rows, h KV heads, r query heads a KV head, t tokens, d head width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

FORMAT = 1  # of what checkpoints hold; a change that old ones do not follow counts it up
KERNELS = ("torch", "fla")  # what sums, the default first


@dataclass(frozen=True)
class Shape:
    """Sizes of an attention layer.

    Attributes:
        hidden: width of what goes into the layer.
        heads, kv_heads: query heads, and heads of keys and values.
        head_dim: width of a head.
        scale: what softmax attention multiplies scores by.
        eps: of the model's norms.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    eps: float = 1e-6

    @property
    def groups(self) -> int:
        """Query heads a KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Seen:
    """One forward pass at one layer.

    Attributes:
        x: [b, t, hidden], what the projections are applied to.
        q: [b, h, r, t, d], queries before RoPE, with the norms of softmax attention unless the
            mixer asks for none.
        k, v: [b, h, 1, t, d], keys (before RoPE) and values.
        q_rope, k_rope: queries and keys after RoPE.
        docs: int64 [b, t], number of each token's document, -1 for padding; None: one document.
    """

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    q_rope: Tensor
    k_rope: Tensor
    docs: Tensor | None


@dataclass
class Past:
    """What a layer keeps from earlier tokens.

    Attributes:
        tensors: by name, the rows of a batch first.
        length: tokens seen, padding included.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    length: int = 0


class Factor(nn.Module):
    """A matrix that multiplies; no `nn.Linear`, or asks for all linears would find it."""

    def __init__(self, into: int, out: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out, into))
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [..., in] to [..., out]."""
        return nn.functional.linear(x, self.weight, self.bias)


class Mixer(nn.Module):
    """Stands for softmax attention between the projections of keys, queries, values and output.

    Args:
        spec: the section `mixer` of the configuration.
        shape: of the layer.

    Attributes:
        normed: whether queries and keys come with the norms that softmax attention has for them.
    """

    normed: ClassVar[bool] = True

    def __init__(self, spec: Mapping[str, Any], shape: Shape) -> None:
        super().__init__()
        self.spec, self.shape = spec, shape
        if self.kernels not in KERNELS:
            raise ValueError(f"mixer: kernels {self.kernels} is none of {', '.join(KERNELS)}")

    def reset(self) -> None:
        """Give the parameters their initial values."""
        raise NotImplementedError

    def forward(self, seen: Seen, past: Past | None) -> Tensor:
        """Return [b, t, heads * value width]; `past` is read and brought up to date."""
        raise NotImplementedError

    @property
    def linear_branch(self) -> bool:
        """Whether the linear branch counts; an ablation leaves it out."""
        return bool(self.spec.get("linear_branch", True))

    @property
    def kernels(self) -> str:
        """What sums: the torch form, or kernels that compute the same."""
        return str(self.spec.get("kernels", KERNELS[0]))


def heads_last(y: Tensor) -> Tensor:
    """Shapes: [b, h, r, t, v] to [b, t, h r v]."""
    b, h, r, t, v = y.shape
    return y.permute(0, 3, 1, 2, 4).reshape(b, t, h * r * v)
