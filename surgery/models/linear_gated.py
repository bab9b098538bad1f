"""Mixers whose state decays by learned gates: gated linear attention, and the gated delta rule.

Both read queries and keys without RoPE and without norms of the stock attention, as published, and
keep one state a KV head, which the query heads of that head share. Neither has a window.

Axis letters: b rows, h KV heads, r query heads a KV head, t tokens, d head width, c channels.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from .linear_core import State
from .linear_kernels import delta_rule, linear_attention
from .linear_seen import Factor, Mixer, Past, Seen, Shape, heads_last

FORMAT = 1  # of what checkpoints hold; a change that old ones do not follow counts it up
RANK = 16  # of the projection to the gates of gated linear attention
NORMALIZER = 16  # divides their logarithms: exp(g/16) forgets slowly
TAPS = 4  # tokens that the short convolution sees, its own included
LITTLE = 0.1  # of the output gate at first: a new layer hardly speaks
DT_BIAS = -4.6  # softplus of it is 0.01: the state lasts a hundred tokens at first
TINY = 1e-6  # under the root of what scales queries and keys to length 1


class _Gated(Mixer):
    """A state, a norm of each head's output, and a gate on it."""

    normed: ClassVar[bool] = False

    def __init__(self, spec: Mapping[str, Any], shape: Shape) -> None:
        super().__init__(spec, shape)
        self.gate = Factor(shape.hidden, shape.heads * shape.head_dim)
        self.norm = nn.Parameter(torch.ones(shape.head_dim))

    def reset(self) -> None:
        """Norm 1; gate drawn, with a deviation of `LITTLE` for inputs of length 1 a channel."""
        nn.init.ones_(self.norm)
        nn.init.normal_(self.gate.weight, std=LITTLE * self.shape.hidden**-0.5)

    def forward(self, seen: Seen, past: Past | None) -> Tensor:
        """Shapes: [b, t, hidden] and heads to [b, t, h r d]."""
        if not self.linear_branch:
            return torch.zeros_like(heads_last(seen.q))
        state = None
        if past is not None and "sums" in past.tensors:
            state = State(past.tensors["sums"], past.tensors["doc"])
        out, state = self.mix(seen, state, past)
        if past is not None:
            past.tensors |= state._asdict()
        return self._gated(heads_last(out), seen.x)

    def mix(self, seen: Seen, state: State | None, past: Past | None) -> tuple[Tensor, State]:
        """Return outputs [b, h, r, t, d] in float32, and the state."""
        raise NotImplementedError

    def _gated(self, out: Tensor, x: Tensor) -> Tensor:
        heads = out.view(*out.shape[:2], -1, self.shape.head_dim)
        scale = torch.rsqrt(heads.square().mean(-1, keepdim=True) + self.shape.eps)
        gate = functional.silu(self.gate(x).to(out.dtype))
        weighted = heads * scale * self.norm.to(out.dtype)
        return (weighted.flatten(-2) * gate).to(x.dtype)


class GatedLinear(_Gated):
    """Gated linear attention: each feature of a key decays at a rate of its own.

    S_i = diag(exp(g_i)) S_{i-1} + k_i v_i^T, o_i = S_i^T q_i / sqrt(d), and the output is
    norm(o_i) * swish(W_g x_i); g_i = logsigmoid(W_2 W_1 x_i + b) / 16 for each feature of a KV
    head.

    Source: Yang et al., Gated Linear Attention Transformers, arXiv 2312.06635, section 4.3, with
    the normaliser and rank of its code; grouped keys share a state.
    """

    def __init__(self, spec: Mapping[str, Any], shape: Shape) -> None:
        super().__init__(spec, shape)
        self.decay_in = Factor(shape.hidden, RANK)
        self.decay_out = Factor(RANK, shape.kv_heads * shape.head_dim, bias=True)

    def reset(self) -> None:
        """Each feature loses 4.2 % a token, 1 - (1/2)^(1/16): W_2 and b are 0, W_1 is drawn."""
        super().reset()
        nn.init.normal_(self.decay_in.weight, std=self.shape.hidden**-0.5)
        for parameter in self.decay_out.parameters():
            nn.init.zeros_(parameter)

    def mix(self, seen: Seen, state: State | None, past: Past | None) -> tuple[Tensor, State]:  # noqa: ARG002
        """Return outputs [b, h, r, t, d] in float32, and the state."""
        logits = _by_head(self.decay_out(self.decay_in(seen.x)), self.shape.kv_heads)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        gate = functional.logsigmoid(logits) / NORMALIZER
        docs = seen.docs
        q = seen.q.to(gate.dtype) * self.shape.head_dim**-0.5
        return linear_attention(
            q,
            seen.k,
            seen.v,
            gate,
            kernels=self.kernels,
            state=state,
            q_docs=docs,
            k_docs=docs,
        )


class GatedDelta(_Gated):
    """The gated delta rule: what a key finds in the state is replaced, and all of it decays.

    Queries, keys and values pass a causal convolution over `TAPS` tokens, each channel by itself,
    and silu; queries and keys are scaled to length 1, queries by 1/sqrt(d). The rule is that of
    `delta_rule` with beta = sigmoid(W_b x) and g = -exp(A) softplus(W_a x + dt), both of a KV head;
    the output is norm(o) * silu(W_z x).

    Source: Yang et al., Gated Delta Networks, arXiv 2412.06464, section 3.4, with grouped heads:
    transformers' Qwen3NextGatedDeltaNet whose repeated keys and values are stored once.
    """

    def __init__(self, spec: Mapping[str, Any], shape: Shape) -> None:
        super().__init__(spec, shape)
        widths = (shape.heads, shape.kv_heads, shape.kv_heads)
        self.conv_q, self.conv_k, self.conv_v = (
            nn.Parameter(torch.zeros(heads * shape.head_dim, TAPS)) for heads in widths
        )
        self.beta = Factor(shape.hidden, shape.kv_heads)
        self.decay = Factor(shape.hidden, shape.kv_heads)
        self.A_log = nn.Parameter(torch.zeros(shape.kv_heads))
        self.dt_bias = nn.Parameter(torch.zeros(shape.kv_heads))

    def reset(self) -> None:
        """The convolution sees its own token alone; beta is 1/2; 1 % of the state goes a token."""
        super().reset()
        for taps in (self.conv_q, self.conv_k, self.conv_v):
            nn.init.zeros_(taps)
            nn.init.ones_(taps[:, -1])
        for parameter in (self.beta.weight, self.decay.weight, self.A_log):
            nn.init.zeros_(parameter)
        nn.init.constant_(self.dt_bias, DT_BIAS)

    def mix(self, seen: Seen, state: State | None, past: Past | None) -> tuple[Tensor, State]:
        """Return outputs [b, h, r, t, d] in float32, and the state."""
        shape, dtype = self.shape, _precise(seen.x)
        q, k, v = self._convolved(seen, past)
        q = _unit(_by_head(q, shape.heads).to(dtype)) * shape.head_dim**-0.5
        k = _unit(_by_head(k, shape.kv_heads).to(dtype))
        beta = self.beta(seen.x).sigmoid().to(dtype)
        rate = functional.softplus(self.decay(seen.x).to(dtype) + self.dt_bias.to(dtype))
        gate = -self.A_log.to(dtype).exp() * rate
        return delta_rule(
            _grouped(q, shape),
            k,
            _by_head(v, shape.kv_heads),
            _by_head(gate, shape.kv_heads),
            _by_head(beta, shape.kv_heads),
            kernels=self.kernels,
            state=state,
            docs=seen.docs,
        )

    def _convolved(self, seen: Seen, past: Past | None) -> tuple[Tensor, ...]:
        """Queries, keys and values after the convolution, [b, t, c] each."""
        x = torch.cat([heads_last(part) for part in (seen.q, seen.k, seen.v)], -1)
        taps = torch.cat((self.conv_q, self.conv_k, self.conv_v))
        docs = x.new_zeros(x.shape[:2], dtype=torch.int64) if seen.docs is None else seen.docs
        earlier = past.tensors if past is not None else {}
        x = x.masked_fill((docs < 0)[..., None], 0)
        before = earlier.get("conv", x.new_zeros(len(x), TAPS - 1, x.shape[-1]))
        told = earlier.get("conv_docs", docs.new_full((len(x), TAPS - 1), -1))
        x, docs = torch.cat((before, x), 1), torch.cat((told, docs), 1)
        if past is not None:
            past.tensors |= {
                "conv": x[:, 1 - TAPS :].clone(),
                "conv_docs": docs[:, 1 - TAPS :].clone(),
            }
        borders = seen.docs is not None or bool(earlier)
        y = functional.silu(_convolve(x, taps.to(x.dtype), docs if borders else None))
        h, r = self.shape.kv_heads, self.shape.groups
        d = self.shape.head_dim
        return torch.split(y, [h * r * d, h * d, h * d], -1)


def _convolve(x: Tensor, taps: Tensor, docs: Tensor | None) -> Tensor:
    """Sum of each channel's last tokens of the same document, [b, taps - 1 + t, c] to [b, t, c]."""
    t = x.shape[1] - TAPS + 1
    total = x[:, -t:] * taps[:, -1]
    for tap in range(TAPS - 1):
        part = x[:, tap : tap + t] * taps[:, tap]
        if docs is not None:
            part = part * (docs[:, tap : tap + t] == docs[:, -t:])[..., None]
        total = total + part
    return total


def _by_head(x: Tensor, heads: int) -> Tensor:
    """Shapes: [b, t, heads w] to [b, heads, 1, t, w]."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)[:, :, None]


def _grouped(q: Tensor, shape: Shape) -> Tensor:
    """Shapes: [b, h r, 1, t, d] to [b, h, r, t, d]."""
    return q.reshape(len(q), shape.kv_heads, shape.groups, *q.shape[3:])


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + TINY)


def _precise(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


GATED: dict[str, type[Mixer]] = {"gla": GatedLinear, "gated-delta": GatedDelta}
