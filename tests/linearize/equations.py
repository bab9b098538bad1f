"""Mixers of one document as their papers print them: float64, dense, quadratic in the length.

Axis letters: b rows, h query heads, t tokens, d head width, f features. Keys and values are
repeated for every query head before they come here. `p` has the parameters by name.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pairs(t: int, window: int | None = None) -> tuple[Tensor, Tensor]:
    """Which keys a query has in its window, and which ones it has before it."""
    i, j = torch.arange(t)[:, None], torch.arange(t)
    if window is None:
        return torch.zeros(t, t, dtype=torch.bool), j <= i
    return (j <= i) & (j > i - window), j <= i - window


def softmax_features(x: Tensor, weight: Tensor) -> Tensor:
    """LoLCATs: softmax(x W) beside softmax(-x W), at least 1e-12."""
    y = torch.einsum("bhtd,hdf->bhtf", x, weight)
    halves = [(s * y).exp() / (s * y).exp().sum(-1, keepdim=True) for s in (1, -1)]
    return torch.cat(halves, -1).clamp(min=1e-12)


def exp_features(x: Tensor, weight: Tensor) -> Tensor:
    """Hedgehog: exp(x W) beside exp(-x W), each scaled so that its largest is 1."""
    y = torch.einsum("bhtd,hdf->bhtf", x, weight)
    halves = [(s * y).exp() / (s * y).exp().amax(-1, keepdim=True) for s in (1, -1)]
    return torch.cat(halves, -1).clamp(min=1e-12)


FEATURES = {"softmax": softmax_features, "exp": exp_features}


def relu_features(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """T2R: relu(x W + b), at least 1e-12."""
    return (torch.einsum("bhtd,hdf->bhtf", x, weight) + bias).clamp(min=1e-12)


def mapped(q: Tensor, k: Tensor, p: dict[str, Tensor], spec: dict) -> Tensor:
    """Inner products of features, [b, h, t, t]."""
    features = FEATURES[spec["feature_map"]]
    return features(q, p["query_map"]) @ features(k, p["key_map"]).mT


def normalised(weights: Tensor, v: Tensor) -> Tensor:
    """Weighted mean of values."""
    return weights @ v / weights.sum(-1, keepdim=True)


def softmax(scores: Tensor, seen: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over the keys that are seen."""
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


def lolcats(i, p: dict[str, Tensor], spec: dict) -> Tensor:
    """The window's exponentials over their row maximum, times gamma; features before it."""
    scores = i.q_rope @ i.k_rope.mT * i.scale
    inside, before = pairs(i.t, spec["window"])
    top = scores.masked_fill(~inside, -torch.inf).amax(-1, keepdim=True)
    gamma = p["window_factors"].sigmoid()[:, None, None]
    near = (scores - top).exp() * inside * gamma
    return normalised(near + mapped(i.q_rope, i.k_rope, p, spec) * before, i.v)


def hedgehog(i, p: dict[str, Tensor], spec: dict) -> Tensor:
    """All tokens, normalised."""
    return normalised(mapped(i.q_rope, i.k_rope, p, spec) * pairs(i.t)[1], i.v)


def t2r(i, p: dict[str, Tensor], spec: dict) -> Tensor:
    """All tokens, normalised."""
    q = relu_features(i.q_rope, p["query_map"], p["query_bias"])
    k = relu_features(i.k_rope, p["key_map"], p["key_bias"])
    return normalised(q @ k.mT * pairs(i.t)[1], i.v)


def gated(q: Tensor, k: Tensor, gates: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """S = diag(gate) S + k v^T, read by q; and the same of ones: a token at a time."""
    b, h, t, d = k.shape
    state, total, outs, sums = q.new_zeros(b, h, d, v.shape[-1]), q.new_zeros(b, h, d), [], []
    for n in range(t):
        state = gates[:, :, n, :, None] * state + k[:, :, n, :, None] * v[:, :, n, None]
        total = gates[:, :, n] * total + k[:, :, n]
        outs.append(torch.einsum("bhd,bhdv->bhv", q[:, :, n], state))
        sums.append((q[:, :, n] * total).sum(-1, keepdim=True))
    return torch.stack(outs, 2), torch.stack(sums, 2)


def liger(i, p: dict[str, Tensor], spec: dict) -> Tensor:
    """Half a window, half a state whose gates are sigmoid(k)^(1/16)."""
    inside, _ = pairs(i.t, spec["window"])
    near = softmax(i.q_rope @ i.k_rope.mT * i.scale, inside, i.v)
    gates = i.k.sigmoid() ** (1 / 16)
    return 0.5 * near + 0.5 * gated(i.q.softmax(-1), i.k.softmax(-1), gates, i.v)[0]


def lizard(i, p: dict[str, Tensor], spec: dict) -> Tensor:
    """A normalised state with one gate a token, and a window whose denominator has sinks."""
    features = FEATURES[spec["feature_map"]]
    q, k = features(i.q, p["query_map"]), features(i.k, p["key_map"])
    gate = (i.x @ p["gate.weight"].mT + p["gate.bias"]).sigmoid()[:, None]
    num, den = gated(q, k, gate.expand_as(k), i.v)
    weights = (i.q @ i.k.mT * i.scale).exp() * pairs(i.t, spec["window"])[0]
    sinks = p["sink_logits"].exp().sum(-1)[:, None, None]
    anchored = weights @ i.v / (weights.sum(-1, keepdim=True) + sinks)
    return num / den + p["alpha"] * anchored


def based(i, p: dict[str, Tensor], spec: dict) -> Tensor:
    """exp(s) in the window; 1 + u + u^2 / 2 before it."""
    inside, before = pairs(i.t, spec["window"])
    q = torch.einsum("bhtd,hdf->bhtf", i.q_rope, p["query_map"])
    k = torch.einsum("bhtd,hdf->bhtf", i.k_rope, p["key_map"])
    u = q @ k.mT * i.scale
    near = (i.q_rope @ i.k_rope.mT * i.scale).exp() * inside
    return normalised(near + (1 + u + u**2 / 2) * before, i.v)


def swa_sink(i, p: dict[str, Tensor], spec: dict) -> Tensor:
    """Softmax over the last tokens and the first."""
    inside, before = pairs(i.t, spec["window"] - spec["sinks"])
    seen = inside | (before & (torch.arange(i.t) < spec["sinks"]))
    return softmax(i.q_rope @ i.k_rope.mT * i.scale, seen, i.v)


EQUATIONS = {
    "lolcats": lolcats,
    "hedgehog": hedgehog,
    "t2r": t2r,
    "liger": liger,
    "lizard": lizard,
    "based": based,
    "swa-sink": swa_sink,
}
