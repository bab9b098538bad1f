"""Mixers made of linear attention with feature maps, and of a softmax window.

Axis letters: b rows, h KV heads, r query heads a KV head, t tokens, d head width, f features.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pad

from .linear_core import Anchors, State, Windowed, linear_attention, window_attention
from .linear_features import MAPS, project
from .linear_seen import Factor, Mixer, Past, Seen, Shape, heads_last

FORMAT = 1  # of what checkpoints hold; a change that old ones do not follow counts it up
WINDOW_FACTOR = math.log(0.1 / 0.9)  # its sigmoid is 0.1
GATE_BIAS = 3.0  # sigmoid: 0.95 of the state lives on
SLOWER = 16  # divides the logarithms of Liger's gates


class Mapped(Mixer):
    """Keys and queries pass learned maps, of every query head its own."""

    def __init__(self, spec: Mapping[str, Any], shape: Shape) -> None:
        super().__init__(spec, shape)
        size = (shape.heads, shape.head_dim, spec["feature_dim"])
        self.query_map, self.key_map = (nn.Parameter(torch.zeros(size)) for _ in range(2))

    def reset(self) -> None:
        """Begin with the identity, cut to the number of features."""
        for weight in (self.query_map, self.key_map):
            weight.copy_(torch.eye(*weight.shape[1:]).expand_as(weight))

    def query_features(self, q: Tensor) -> Tensor:
        """Shapes: [b, h, r, t, d] to [b, h, r, t, f]."""
        return self._features(q, self.query_map)

    def key_features(self, k: Tensor) -> Tensor:
        """Shapes: [b, h, 1, t, d] to [b, h, r, t, f]."""
        return self._features(k, self.key_map)

    def _features(self, x: Tensor, weight: Tensor) -> Tensor:
        return MAPS[self.spec["feature_map"]](project(x, weight))


def _state(past: Past | None) -> State | None:
    kept = {} if past is None else past.tensors
    return State(kept["sums"], kept["doc"]) if "sums" in kept else None


def _keep_state(past: Past | None, state: State) -> None:
    if past is not None:
        past.tensors |= {"sums": state.sums, "doc": state.doc}


def _sums(  # noqa: PLR0917
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    docs: tuple[Tensor | None, Tensor | None],
    past: Past | None,
) -> tuple[Tensor, Tensor]:
    """Numerator [.., t, d] and denominator [.., t, 1] of normalised linear attention."""
    ones = pad(v.to(q.dtype), (0, 1), value=1.0)
    options = {"q_docs": docs[0], "k_docs": docs[1]}
    out, state = linear_attention(q, k, ones, gate, state=_state(past), **options)
    _keep_state(past, state)
    return out[..., :-1], out[..., -1:]


def _ratio(num: Tensor, den: Tensor) -> Tensor:
    """A quotient; 0 where a padded query sees nothing."""
    return num / den.masked_fill(den == 0, 1)


class Recent:
    """Keys and values of the last tokens, those kept from before with the new ones."""

    def __init__(self, k: Tensor, seen: Seen, past: Past | None, window: int) -> None:
        v, docs = seen.v, seen.docs
        self.lead = 0
        if past is not None:
            if docs is None:
                docs = torch.zeros(k.shape[0], k.shape[3], dtype=torch.long, device=k.device)
            kept = past.tensors
            if "keys" in kept:
                self.lead = kept["keys"].shape[3]
                k = torch.cat((kept["keys"], k), 3)
                v = torch.cat((kept["values"], v), 3)
                docs = torch.cat((kept["docs"], docs), 1)
            kept["keys"], kept["values"] = (x[:, :, :, -window:] for x in (k, v))
            kept["docs"] = docs[:, -window:]
        self.k, self.v, self.docs = k, v, docs

    def attend(
        self, q: Tensor, seen: Seen, window: int, scale: float, anchors: Anchors | None = None
    ) -> Windowed:
        """Softmax attention over the window."""
        return window_attention(
            q,
            self.k,
            self.v,
            window=window,
            scale=scale,
            lead=self.lead,
            q_docs=seen.docs,
            k_docs=self.docs,
            anchors=anchors,
        )

    def before(self, window: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and documents shifted: at each query's place what leaves its window."""
        t = self.k.shape[3] - self.lead
        start = self.lead - window  # 0 or less: not more than the window is kept
        docs = self.docs
        if docs is None:
            docs = torch.zeros(self.k.shape[0], t, dtype=torch.long, device=self.k.device)
        k, v = (pad(x, (0, 0, -start, 0))[:, :, :, :t] for x in (self.k, self.v))
        return k, v, pad(docs, (-start, 0), value=-1)[:, :t]


class Lolcats(Mapped):
    """Softmax in a window and features of what lies before it, under one normaliser.

    y_i = (g N_w + N_l) / (g D_w + D_l): sums of exp(s_ij - max_j s_ij) over the last w tokens,
    times g = sigmoid(window_factors) of each head, and of inner products of features over all
    tokens j <= i - w, after RoPE.

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
        recent = Recent(seen.k_rope, seen, past, window)
        near = recent.attend(seen.q_rope, seen, window, self.shape.scale)
        factor = self.window_factors.to(near.num.dtype).sigmoid()
        factor = factor.view(self.shape.kv_heads, self.shape.groups, 1, 1)
        num, den = factor * near.num, factor * near.den
        k, v, docs = recent.before(window)
        q_docs = seen.docs if seen.docs is not None else torch.zeros_like(docs)
        asked, given = self.query_features(seen.q_rope), self.key_features(k)
        far = _sums(asked, given, v, None, (q_docs, docs), past)
        if self.linear_branch:
            num, den = num + far[0], den + far[1]
        return heads_last(_ratio(num, den)).to(seen.x.dtype)


class Hedgehog(Mapped):
    """Normalised linear attention over all tokens, with learned features of rotated keys.

    Source: "The Hedgehog & the Porcupine", arXiv 2402.04347, section 4.2.
    """

    def forward(self, seen: Seen, past: Past | None) -> Tensor:
        """Shapes: see `Mixer`."""
        asked, given = self.query_features(seen.q_rope), self.key_features(seen.k_rope)
        num, den = _sums(asked, given, seen.v, None, (seen.docs, seen.docs), past)
        if not self.linear_branch:
            num = torch.zeros_like(num)
        return heads_last(_ratio(num, den)).to(seen.x.dtype)


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
    of a KV head; no scale and no normaliser. The pooling of the published code is the identity.

    Source: "Liger", arXiv 2503.01496, section 3.2, and its code.
    """

    def reset(self) -> None:
        """It has no parameters."""

    def forward(self, seen: Seen, past: Past | None) -> Tensor:
        """Shapes: see `Mixer`."""
        window = self.spec["window"]
        near = Recent(seen.k_rope, seen, past, window).attend(
            seen.q_rope, seen, window, self.shape.scale
        )
        wide = near.num.dtype
        q, k = seen.q.to(wide), seen.k.to(wide)
        out, state = linear_attention(
            q.softmax(-1),
            k.softmax(-1),
            seen.v,
            logsigmoid(k) / SLOWER,
            state=_state(past),
            q_docs=seen.docs,
            k_docs=seen.docs,
        )
        _keep_state(past, state)
        mixed = 0.5 * _ratio(near.num, near.den)
        if self.linear_branch:
            mixed = mixed + 0.5 * out
        return heads_last(mixed).to(seen.x.dtype)


class Lizard(Mapped):
    """Gated linear attention, and a softmax window with learned sinks on top of it; no RoPE.

    y = y_gate + alpha y_window; y_gate is normalised, with features of each query head and one
    gate sigmoid(W x + b) a token for all heads; the window's denominator has the exponentials of a
    few learned logits more.

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
        nn.init.zeros_(self.sink_logits)

    def forward(self, seen: Seen, past: Past | None) -> Tensor:
        """Shapes: see `Mixer`."""
        window = self.spec["window"]
        recent = Recent(seen.k, seen, past, window)
        near = recent.attend(seen.q, seen, window, self.shape.scale)
        wide = near.num.dtype
        gate = logsigmoid(self.gate(seen.x).to(wide))[:, None, None]
        asked, given = self.query_features(seen.q), self.key_features(seen.k)
        num, den = _sums(asked, given, seen.v, gate, (seen.docs, seen.docs), past)
        mixed = self.alpha.to(wide) * self._anchored(near)
        if self.linear_branch:
            mixed = mixed + _ratio(num, den)
        return heads_last(mixed).to(seen.x.dtype)

    def _anchored(self, near: Windowed) -> Tensor:
        logits = self.sink_logits.to(near.num.dtype)
        logits = logits.view(self.shape.kv_heads, self.shape.groups, 1, -1)
        top = torch.cat((near.top, logits.expand(*near.top.shape[:-1], -1)), -1)
        top = top.amax(-1, keepdim=True)
        fall = (near.top - top).exp()
        sinks = (logits - top).exp().sum(-1, keepdim=True)
        return near.num * fall / (near.den * fall + sinks)


class Based(Mapped):
    """A softmax window, and before it the second-order expansion of the same exponential.

    Weights are 1 + s + s^2/2 with s the scaled score of learned projections to a few dimensions,
    and exp(s) in the window, under one normaliser; with the identity as projection the expansion is
    that of the softmax weights.

    Source: "Based", arXiv 2402.18668, sections 3 and 4. There windows and expansions alternate over
    layers; here, where layers are given, every layer has both.
    """

    def query_features(self, q: Tensor) -> Tensor:
        """Shapes: [b, h, r, t, d] to [b, h, r, t, 1 + f + f^2]."""
        return super().query_features(q * self.shape.scale**0.5)

    def key_features(self, k: Tensor) -> Tensor:
        """Shapes: [b, h, 1, t, d] to [b, h, r, t, 1 + f + f^2]."""
        return super().key_features(k * self.shape.scale**0.5)

    def forward(self, seen: Seen, past: Past | None) -> Tensor:
        """Shapes: see `Mixer`."""
        window = self.spec["window"]
        recent = Recent(seen.k_rope, seen, past, window)
        near = recent.attend(seen.q_rope, seen, window, self.shape.scale)
        k, v, docs = recent.before(window)
        q_docs = seen.docs if seen.docs is not None else torch.zeros_like(docs)
        asked, given = self.query_features(seen.q_rope), self.key_features(k)
        far = _sums(asked, given, v, None, (q_docs, docs), past)
        top = near.top.clamp(min=0)
        up, down = (near.top - top).exp(), (-top).exp()
        num, den = up * near.num, up * near.den
        if self.linear_branch:
            num, den = num + down * far[0], den + down * far[1]
        return heads_last(_ratio(num, den)).to(seen.x.dtype)


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
        window = self.spec["window"] - self.spec["sinks"]
        begun = 0 if past is None else past.length
        recent = Recent(seen.k_rope, seen, past, window)
        anchors = None
        if self.spec["sinks"]:
            first = self._first(seen, past, begun)
            anchors = first._replace(slots=first.slots - (begun - recent.lead))
        near = recent.attend(seen.q_rope, seen, window, self.shape.scale, anchors)
        return heads_last(_ratio(near.num, near.den)).to(seen.x.dtype)

    def _first(self, seen: Seen, past: Past | None, begun: int) -> Anchors:
        """The first tokens of every document, their slots counted from the first of all."""
        k, v, docs = seen.k_rope, seen.v, seen.docs
        b, t = k.shape[0], k.shape[3]
        if docs is None:
            docs = torch.zeros(b, t, dtype=torch.long, device=k.device)
        slots = torch.arange(begun, begun + t, device=k.device).expand(b, t)
        kept = {} if past is None else past.tensors
        if "sink_keys" in kept:
            k, v = torch.cat((kept["sink_keys"], k), 3), torch.cat((kept["sink_values"], v), 3)
            docs = torch.cat((kept["sink_docs"], docs), 1)
            slots = torch.cat((kept["sink_slots"], slots), 1)
        first = _rank(docs) < self.spec["sinks"]
        most = self.spec["sinks"] if past is not None else int(first.sum(1).amax())
        places = (~first).long().argsort(dim=1, stable=True)[:, :most]
        docs = docs.masked_fill(~first, -1).gather(1, places)
        slots = slots.gather(1, places)
        k, v = (_taken(x, places) for x in (k, v))
        short = most - places.shape[1]
        if short > 0:  # of a text that has fewer tokens, so that what is kept has one size
            k, v = (pad(x, (0, 0, 0, short)) for x in (k, v))
            docs, slots = pad(docs, (0, short), value=-1), pad(slots, (0, short))
        if past is not None:
            names = ("sink_keys", "sink_values", "sink_docs", "sink_slots")
            kept |= dict(zip(names, (k, v, docs, slots), strict=True))
        return Anchors(k, v, docs, slots)


def _rank(docs: Tensor) -> Tensor:
    """How many tokens of its document come before each, padding aside; many for padding."""
    real = docs >= 0
    count = real.long().cumsum(1)
    starts = docs > pad(docs.cummax(1).values, (1, -1), value=-1)
    base = torch.where(starts, count - 1, 0).cummax(1).values
    return (count - 1 - base).masked_fill(~real, docs.shape[1])


def _taken(x: Tensor, places: Tensor) -> Tensor:
    """Shapes: [b, h, 1, t, d] to [b, h, 1, n, d]."""
    index = places[:, None, None, :, None].expand(-1, x.shape[1], 1, -1, x.shape[-1])
    return x.gather(3, index)


MIXERS: dict[str, type[Mixer]] = {
    "lolcats": Lolcats,
    "hedgehog": Hedgehog,
    "t2r": T2R,
    "liger": Liger,
    "lizard": Lizard,
    "based": Based,
    "swa-sink": Sinks,
}
