"""Mixers made of linear attention with feature maps, and of a softmax window.

Axis letters: b rows, h KV heads, r query heads a KV head, t tokens, d head width, f features.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from .linear_core import Windowed
from .linear_features import MAPS, project
from .linear_kernels import linear_attention
from .linear_mapped import Mapped, keep_state, kept_state, ratio
from .linear_near import Near, first_tokens, near
from .linear_seen import Factor, Mixer, Past, Seen, Shape, heads_last

FORMAT = 1  # of what checkpoints hold; a change that old ones do not follow counts it up
WINDOW_FACTOR = math.log(0.1 / 0.9)  # its sigmoid is 0.1
GATE_BIAS = 3.0  # sigmoid: 0.95 of the state lives on
SLOWER = 16  # divides the logarithms of Liger's gates


def _out(y: Tensor, seen: Seen) -> Tensor:
    """Shapes: [b, h, r, t, d] to [b, t, h r d]."""
    return heads_last(y).to(seen.v.dtype)


class Lolcats(Mapped):
    """Softmax in a window and features of what lies before it, under one normaliser.

    y_i = (g N_w + N_l) / (g D_w + D_l): sums of exp(s_ij - max_j s_ij) over the last w tokens,
    times g = sigmoid(window_factors) of each head, and of inner products of features over all
    tokens j <= i - w, after RoPE. The maximum is part of the model: without it g would mean another
    weight at every token.

    Source: "LoLCATs", arXiv 2410.10254, section 3.3, and its code (sliding window).
    """

    def __init__(self, spec: Mapping[str, Any], shape: Shape) -> None:
        super().__init__(spec, shape)
        self.window_factors = nn.Parameter(torch.zeros(shape.heads))

    def reset(self) -> None:
        """Maps begin as the identity, the window counts 0.1."""
        super().reset()
        nn.init.constant_(self.window_factors, WINDOW_FACTOR)

    def forward(self, seen: Seen, past: Past | None) -> Tensor:
        """Shapes: see `Mixer`."""
        window = self.spec["window"]
        keys = near(seen.k_rope, seen, past, keep=window)
        own = keys.attend(seen.q_rope, window=window, scale=self.shape.scale)
        factor = self.window_factors.to(own.num.dtype).sigmoid()
        factor = factor.view(self.shape.kv_heads, self.shape.groups, 1, 1)
        num, den = factor * own.num, factor * own.den
        if self.linear_branch:
            far = self.sums(seen.q_rope, keys.gone(window), seen.docs, past, None)
            num, den = num + far[0], den + far[1]
        return _out(ratio(num, den), seen)


class Hedgehog(Mapped):
    """Normalised linear attention over all tokens, with learned features of rotated keys.

    Source: "The Hedgehog & the Porcupine", arXiv 2402.04347, section 4.2.
    """

    def forward(self, seen: Seen, past: Past | None) -> Tensor:
        """Shapes: see `Mixer`."""
        if not self.linear_branch:
            return _out(torch.zeros_like(seen.q), seen)
        keys = Near(seen.k_rope, seen.v, seen.docs, 0)
        return _out(ratio(*self.sums(seen.q_rope, keys, seen.docs, past, None)), seen)


class T2R(Hedgehog):
    """Features are relu(W x + b).

    Source: "Finetuning Pretrained Transformers into RNNs", arXiv 2103.13076, section 2.2.
    """

    def __init__(self, spec: Mapping[str, Any], shape: Shape) -> None:
        super().__init__(spec, shape)
        size = (shape.heads, 1, spec["feature_dim"])
        self.query_bias, self.key_bias = (nn.Parameter(torch.zeros(size)) for _ in range(2))

    def reset(self) -> None:
        """Maps begin as the identity, biases at 0."""
        super().reset()
        for bias in (self.query_bias, self.key_bias):
            nn.init.zeros_(bias)

    def query_features(self, q: Tensor) -> Tensor:
        """Shapes: [b, h, r, t, d] to [b, h, r, t, f]."""
        return MAPS[self.spec["feature_map"]](project(q, self.query_map, self.query_bias))

    def key_features(self, k: Tensor) -> Tensor:
        """Shapes: [b, h, 1, t, d] to [b, h, r, t, f]."""
        return MAPS[self.spec["feature_map"]](project(k, self.key_map, self.key_bias))


class Liger(Mixer):
    """Half a softmax window, half gated linear attention whose gates are the keys themselves.

    Features are softmax(q) and softmax(k) before RoPE, gates logsigmoid(k) / 16 of each dimension
    of a KV head, whose query heads share one state; no scale and no normaliser. The pooling of the
    published code is the identity; where the model norms keys, k is after the norm. Without the
    linear branch the window has the weight of both.

    Source: "Liger", arXiv 2503.01496, section 3.2, and its code.
    """

    def reset(self) -> None:
        """It has no parameters."""

    def forward(self, seen: Seen, past: Past | None) -> Tensor:
        """Shapes: see `Mixer`."""
        window = self.spec["window"]
        keys = near(seen.k_rope, seen, past, keep=window)
        own = keys.attend(seen.q_rope, window=window, scale=self.shape.scale)
        mixed = ratio(own.num, own.den)
        if self.linear_branch:
            q, k = seen.q.to(mixed.dtype), seen.k.to(mixed.dtype)
            out, state = linear_attention(
                q.softmax(-1),
                k.softmax(-1),
                seen.v,
                logsigmoid(k) / SLOWER,
                kernels=self.kernels,
                state=kept_state(past),
                q_docs=seen.docs,
                k_docs=seen.docs,
            )
            keep_state(state, past)
            mixed = 0.5 * mixed + 0.5 * out
        return _out(mixed, seen)


class Lizard(Mapped):
    """Gated linear attention, and a softmax window with learned sinks on top of it; no RoPE.

    y = y_gate + alpha y_window; y_gate is normalised, with features of each query head and one
    gate sigmoid(W x + b) a token for all heads; the window's denominator has the exponentials of a
    few learned logits more (the paper prints the logits themselves, whose sum may be negative).

    Source: "Lizard", arXiv 2507.09025, sections 3.1 and 3.2. The bias b, and where parameters
    begin, are ours: the paper gives neither.
    """

    def __init__(self, spec: Mapping[str, Any], shape: Shape) -> None:
        super().__init__(spec, shape)
        self.gate = Factor(shape.hidden, 1, bias=True)
        self.alpha = nn.Parameter(torch.zeros(1))
        self.sink_logits = nn.Parameter(torch.zeros(shape.heads, spec["sinks"]))

    def reset(self) -> None:
        """Maps begin as the identity, gates at 0.95, alpha at 1, sinks at exp(0)."""
        super().reset()
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, GATE_BIAS)  # type: ignore[arg-type]
        nn.init.ones_(self.alpha)
        with torch.no_grad():
            self.sink_logits.zero_()  # there may be none

    def forward(self, seen: Seen, past: Past | None) -> Tensor:
        """Shapes: see `Mixer`."""
        window = self.spec["window"]
        keys = near(seen.k, seen, past, keep=window)
        own = keys.attend(seen.q, window=window, scale=self.shape.scale)
        mixed = self.alpha.to(own.num.dtype) * self._anchored(own)
        if self.linear_branch:
            gate = logsigmoid(self.gate(seen.x).to(mixed.dtype))[:, None, None]
            every = Near(seen.k, seen.v, seen.docs, 0)
            mixed = mixed + ratio(*self.sums(seen.q, every, seen.docs, past, gate))
        return _out(mixed, seen)

    def _anchored(self, own: Windowed) -> Tensor:
        logits = self.sink_logits.to(own.num.dtype)
        logits = logits.view(self.shape.kv_heads, self.shape.groups, 1, -1)
        top = torch.cat((own.top, logits.expand(*own.top.shape[:-1], -1)), -1)
        top = top.amax(-1, keepdim=True)
        fall = (own.top - top).exp()
        sinks = (logits - top).exp().sum(-1, keepdim=True)
        return ratio(own.num * fall, own.den * fall + sinks)


class Based(Mapped):
    """A softmax window, and before it the second-order expansion of the same exponential.

    y_i = (sum exp(s_ij) v_j + sum (1 + u_ij + u_ij^2 / 2) v_j) / (the sums of the weights), over
    the last w tokens and over all tokens j <= i - w. u is the product of learned projections times
    the scale that softmax attention has. So, while the projections are cut identities, u is that
    part of the score s that comes from the first dimensions, and with all dimensions it is s; the
    paper's scale is one over the root of the number of features, which is the same for as many
    features as dimensions.

    Source: "Based", arXiv 2402.18668, sections 3 and 4. There windows and expansions alternate over
    layers, before RoPE; here a layer has both, after RoPE, under one normaliser.
    """

    def query_features(self, q: Tensor) -> Tensor:
        """Shapes: [b, h, r, t, d] to [b, h, r, t, 1 + f + f (f + 1) / 2]."""
        return MAPS[self.spec["feature_map"]](project(q, self.query_map) * self.shape.scale)

    def forward(self, seen: Seen, past: Past | None) -> Tensor:
        """Shapes: see `Mixer`."""
        window = self.spec["window"]
        keys = near(seen.k_rope, seen, past, keep=window)
        own = keys.attend(seen.q_rope, window=window, scale=self.shape.scale)
        if not self.linear_branch:
            return _out(ratio(own.num, own.den), seen)
        num, den = self.sums(seen.q_rope, keys.gone(window), seen.docs, past, None)
        some = den > 0  # a weight is at least 1/2
        # Neither exponent is above 0, and the larger weight does not vanish.
        top = torch.where(some, own.top.clamp(min=0), own.top).detach()
        up, down = (own.top - top).exp(), torch.where(some, (-top.clamp(min=0)).exp(), 0)
        return _out(ratio(up * own.num + down * num, up * own.den + down * den), seen)


class Sinks(Mixer):
    """Softmax over the last tokens and the first few of the document; nothing to train.

    `window` counts both. Keys keep the positions that they have in the text.

    Source: "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453, section
    3.2 (there positions are counted within the cache).
    """

    def reset(self) -> None:
        """It has no parameters."""

    def forward(self, seen: Seen, past: Past | None) -> Tensor:
        """Shapes: see `Mixer`."""
        sinks = self.spec["sinks"]
        window = self.spec["window"] - sinks
        keys = near(seen.k_rope, seen, past, keep=window)
        first = first_tokens(seen, past, count=sinks, lead=keys.lead) if sinks else None
        own = keys.attend(seen.q_rope, window=window, scale=self.shape.scale, anchors=first)
        return _out(ratio(own.num, own.den), seen)


MIXERS: dict[str, type[Mixer]] = {
    "lolcats": Lolcats,
    "hedgehog": Hedgehog,
    "t2r": T2R,
    "liger": Liger,
    "lizard": Lizard,
    "based": Based,
    "swa-sink": Sinks,
}


def state_bytes(spec: Mapping[str, Any], shape: Shape, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes that a mixer of these methods keeps of a row, however long it is.

    Args:
        dtype: of the model; sums are float32 in any.
    """
    h, r, d = shape.kv_heads, shape.groups, shape.head_dim
    past = Past()
    x = torch.zeros(1, 1, shape.hidden, dtype=dtype)
    q, k = (torch.zeros(1, h, n, 1, d, dtype=dtype) for n in (r, 1))
    with torch.no_grad():
        MIXERS[spec["method"]](spec, shape).to(dtype)(Seen(x, q, k, k, q, k, None), past)
    return sum(kept.nbytes for kept in past.tensors.values())
