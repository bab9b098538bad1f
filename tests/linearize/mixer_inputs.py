"""Mixers of every method with drawn parameters, and what they are given."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

from linearize.equations import EQUATIONS
from surgery.models.linear_mixers import MIXERS
from surgery.models.linear_seen import Past, Seen, Shape

HIDDEN, KV, D, F, W = 12, 2, 6, 5, 8
TIGHT = {"atol": 1e-10, "rtol": 1e-9}
SPECS = {
    "lolcats": {"window": W, "feature_map": "softmax"},
    "lolcats exp": {"window": W, "feature_map": "exp"},
    "hedgehog": {"feature_map": "exp"},
    "hedgehog softmax": {"feature_map": "softmax"},
    "t2r": {"feature_map": "relu"},
    "liger": {"window": W},
    "lizard": {"window": W, "feature_map": "softmax", "sinks": 3},
    "lizard without sinks": {"window": W, "feature_map": "exp", "sinks": 0},
    "based": {"window": W, "feature_map": "taylor"},
    "swa-sink": {"window": W, "sinks": 3},
    "swa-sink without sinks": {"window": W, "sinks": 0},
}
methods = pytest.mark.parametrize("name", SPECS)
windows = pytest.mark.parametrize("name", [n for n, spec in SPECS.items() if "window" in spec])


def mixer(name, *, kv_heads=KV, groups=2, d=D, dtype=torch.float64, **more):
    """A mixer all of whose parameters are drawn."""
    method = name.split()[0]
    spec = {"method": method, "feature_dim": min(F, d), "window": 0, "sinks": 0, **SPECS[name]}
    shape = Shape(hidden=HIDDEN, heads=kv_heads * groups, kv_heads=kv_heads, head_dim=d, scale=0.4)
    made = MIXERS[method](spec | more, shape).to(dtype)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.7)
    return made


def seen(made, t, *, docs=None, rows=2, dtype=torch.float64, seed=1):
    """What a layer gives a mixer; rotated queries and keys are drawn on their own."""
    drawn, s = torch.Generator().manual_seed(seed), made.shape

    def draw(*shape):
        return torch.randn(*shape, generator=drawn, dtype=torch.float64).to(dtype)

    q, q_rope = draw(2, rows, s.kv_heads, s.groups, t, s.head_dim)
    k, v, k_rope = draw(3, rows, s.kv_heads, 1, t, s.head_dim)
    return Seen(draw(rows, t, HIDDEN), q, k, v, q_rope, k_rope, docs)


def part(given, at, docs=None):
    """Some of the tokens."""
    cut = [x[..., at, :] for x in (given.q, given.k, given.v, given.q_rope, given.k_rope)]
    return Seen(given.x[:, at], *cut, docs)


@dataclass
class Inputs:
    """One document for the equations: every query head with its own copy of keys and values."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_rope: torch.Tensor
    k_rope: torch.Tensor
    x: torch.Tensor
    scale: float
    t: int


def wanted(made, given):
    """What the equations give, [b, t, h r d]."""
    s, p = made.shape, {n: x.detach() for n, x in made.named_parameters()}
    heads = [
        x.expand(-1, -1, s.groups, -1, -1).flatten(1, 2)
        for x in (given.q, given.k, given.v, given.q_rope, given.k_rope)
    ]
    t = given.x.shape[1]
    y = EQUATIONS[made.spec["method"]](Inputs(*heads, given.x, s.scale, t), p, made.spec)
    return y.transpose(1, 2).flatten(2)


def in_pieces(made, given, pieces, docs=None):
    """Outputs of one piece after another."""
    past, outs, at = Past(), [], 0
    for piece in pieces:
        own = slice(at, at + piece)
        told = None if docs is None else docs[:, own]
        outs.append(made(part(given, own, told), past))
        at += piece
        past.length += piece
    return torch.cat(outs, 1)


def cuts(t, seed, longest=12):
    """Pieces of random lengths."""
    drawn, left, pieces = random.Random(seed), t, []
    while left:
        pieces.append(min(drawn.randint(1, longest), left))
        left -= pieces[-1]
    return pieces
