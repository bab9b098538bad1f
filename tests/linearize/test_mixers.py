"""Mixers with feature maps and windows: their equations, what they keep, how they begin."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from linearize.equations import EQUATIONS, exp_features, softmax_features
from linearize.mixer_inputs import (
    KV,
    SPECS,
    TIGHT,
    D,
    F,
    Inputs,
    W,
    cuts,
    in_pieces,
    methods,
    mixer,
    part,
    seen,
    wanted,
    windows,
)
from surgery.models.linear_features import MAPS, exp_map, softmax_map, taylor_map
from surgery.models.linear_mixers import state_bytes
from surgery.models.linear_seen import Past, Seen

# -- equations --------------------------------------------------------------------------------

SHAPES = [(1, 4, 6), (2, 1, 4), (2, 2, 8), (3, 2, 5)]  # KV heads, groups, width
LENGTHS = [1, 2, W - 1, W, W + 1, 3 * W, 64, 65, 150]


@methods
@pytest.mark.parametrize("t", LENGTHS)
@torch.no_grad()
def test_it_is_its_equation_at_any_length(name, t):
    made = mixer(name)
    given = seen(made, t)
    torch.testing.assert_close(made(given, None), wanted(made, given), **TIGHT)


@methods
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", [1, 4, 70])
@torch.no_grad()
def test_it_is_its_equation_for_any_heads_and_window(name, shape, window):
    kv_heads, groups, d = shape
    more = {"window": window} if "window" in SPECS[name] else {}
    if SPECS[name].get("sinks"):
        more |= {"sinks": min(3, window - 1) if name.startswith("swa") else 2}
    made = mixer(name, kv_heads=kv_heads, groups=groups, d=d, **more)
    given = seen(made, 90)
    torch.testing.assert_close(made(given, None), wanted(made, given), **TIGHT)


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_narrow_numbers_come_close(name, dtype):
    made = mixer(name, dtype=dtype)
    given = seen(made, 90, dtype=dtype)
    found = made(given, None)
    assert found.dtype == dtype
    exact = [x.double() for x in (given.x, given.q, given.k, given.v, given.q_rope, given.k_rope)]
    gap = (found.double() - wanted(made.double(), Seen(*exact, None))).abs().max()
    assert gap < {torch.float32: 2e-5, torch.bfloat16: 0.06}[dtype]


# -- what is kept -------------------------------------------------------------------------------


@methods
@torch.no_grad()
def test_what_is_kept_has_one_size(name):
    made = mixer(name, dtype=torch.bfloat16)
    given, past, sizes = seen(made, 40, dtype=torch.bfloat16), Past(), set()
    for piece in ([0, 1], [1, 2], [2, 20], *([n, n + 1] for n in range(20, 40))):
        made(part(given, slice(*piece)), past)
        past.length = piece[1]
        for kept in past.tensors.values():
            assert len(kept) == 2
            held = kept.untyped_storage().nbytes()
            assert held == kept.nbytes  # no view of a whole text
        sizes.add(sum(kept.nbytes for kept in past.tensors.values()))
    assert sizes == {2 * state_bytes(made.spec, made.shape)}


@torch.no_grad()
def test_a_state_is_shared_where_keys_are():
    for name, heads in (("liger", 1), ("lolcats", 2), ("lizard", 2), ("based", 2)):
        made, past = mixer(name), Past()
        made(seen(made, 9), past)
        assert past.tensors["sums"].shape[1:3] == (KV, heads)
        assert past.tensors["keys"].shape == (2, KV, 1, W, D)


@torch.no_grad()
def test_sums_are_precise_and_keys_as_the_model():
    made, past = mixer("lolcats", dtype=torch.bfloat16), Past()
    made(seen(made, 9, dtype=torch.bfloat16), past)
    kinds = {name: kept.dtype for name, kept in past.tensors.items()}
    assert kinds["sums"] == torch.float32
    assert kinds["keys"] == kinds["values"] == torch.bfloat16


# -- gradients ----------------------------------------------------------------------------------


@methods
@pytest.mark.parametrize("size", [1, 1000])
def test_gradients_are_finite_in_bfloat16(name, size):
    made = mixer(name, dtype=torch.bfloat16)
    given = seen(made, 90, dtype=torch.bfloat16)
    parts = [size * getattr(given, n) for n in ("x", "q", "k", "v", "q_rope", "k_rope")]
    parts = [x.requires_grad_() for x in parts]
    docs = torch.arange(90).expand(2, -1) // 50 - torch.tensor([[0], [1]])
    out = made(Seen(*parts, docs), None)
    assert torch.isfinite(out).all()
    (out * (docs >= 0)[..., None]).float().abs().mean().backward()
    for gradient in [x.grad for x in parts if x.grad is not None]:
        assert torch.isfinite(gradient).all()
    for own, parameter in made.named_parameters():
        if parameter.numel():
            assert torch.isfinite(parameter.grad).all(), own
            assert parameter.grad.any() or size > 1, own


@methods
def test_gradients_are_those_of_the_equation(name):
    made = mixer(name)
    names = ("x", "q", "k", "v", "q_rope", "k_rope")
    found = []
    for run in (lambda given: made(given, None), lambda given: live(made, given)):
        given = seen(made, 21)
        parts = [getattr(given, n).requires_grad_() for n in names]
        made.zero_grad()
        torch.manual_seed(5)
        out = run(given)
        (out * torch.randn_like(out)).sum().backward()
        own = [p for p in made.parameters() if p.numel()]
        found.append([torch.zeros(()) if p.grad is None else p.grad.clone() for p in parts + own])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-7)


def live(made, given):
    """The equations, with gradients of the parameters."""
    s = made.shape
    heads = [
        x.expand(-1, -1, s.groups, -1, -1).flatten(1, 2)
        for x in (given.q, given.k, given.v, given.q_rope, given.k_rope)
    ]
    inputs = Inputs(*heads, given.x, s.scale, given.x.shape[1])
    y = EQUATIONS[made.spec["method"]](inputs, dict(made.named_parameters()), made.spec)
    return y.transpose(1, 2).flatten(2)


# -- the ablation, and how they begin --------------------------------------------------------------


@windows
@torch.no_grad()
def test_without_its_linear_branch_a_window_is_left(name):
    made = mixer(name, linear_branch=False)
    given = seen(made, 60)
    far = replace(given, v=given.v.clone(), x=-given.x)
    far.v[..., :30, :] = 1e3
    found, past = made(given, None), Past()
    sinks = made.spec["sinks"] if name.startswith("swa") else 0
    if not sinks:
        assert torch.equal(made(far, None)[:, 30 + W :], found[:, 30 + W :])
    torch.testing.assert_close(in_pieces(made, given, cuts(60, 0)), found, **TIGHT)
    made(given, past)
    assert "sums" not in past.tensors
    if not name.startswith("lizard") and not sinks:
        nothing = mixer("swa-sink without sinks")
        torch.testing.assert_close(found, nothing(given, None), **TIGHT)


@pytest.mark.parametrize("name", ["hedgehog", "t2r"])
def test_without_its_linear_branch_nothing_is_left(name):
    made = mixer(name, linear_branch=False)
    assert not made(seen(made, 9), None).any()


@torch.no_grad()
def test_based_begins_as_the_expansion_of_softmax():
    made = mixer("based", feature_dim=D)
    made.reset()
    given = seen(made, 80)
    small = replace(given, q_rope=0.05 * given.q_rope)
    s = made.shape
    scores = small.q_rope @ small.k_rope.mT * s.scale
    causal = torch.ones(80, 80, dtype=torch.bool).tril()
    exact = scores.masked_fill(~causal, -torch.inf).softmax(-1) @ small.v
    found = made(small, None).unflatten(-1, (KV, 2, D)).permute(0, 2, 3, 1, 4)
    assert (found - exact).abs().max() < scores.abs().max() ** 3  # the first term that is left out


@pytest.mark.parametrize("score", [-1e4, -200.0, 200.0, 1e4])
@torch.no_grad()
def test_based_survives_any_scores(score):
    made = mixer("based", dtype=torch.float32)
    given = seen(made, 30, dtype=torch.float32)
    size = (abs(score) / made.shape.scale) ** 0.5
    at = torch.zeros(D).index_fill(0, torch.tensor([0]), 1.0)
    q, k = (x.mul(1e-3).add(at * size) for x in (given.q_rope, given.k_rope))
    given = replace(given, q_rope=q, k_rope=k if score > 0 else -k)
    found = made(given, None)
    exact = [x.double() for x in (given.x, given.q, given.k, given.v, given.q_rope, given.k_rope)]
    alone = mixer("swa-sink without sinks")(Seen(*exact, None), None)
    first = alone[:, :W] if score < 0 else alone  # nothing lies before the window yet
    torch.testing.assert_close(found[:, : first.shape[1]].double(), first, atol=1e-3, rtol=1e-3)
    assert torch.isfinite(found).all()


BEGIN = {
    "lolcats": {"window_factors": 0.1},
    "lizard": {"gate.bias": 0.9526},
}


@methods
@torch.no_grad()
def test_reset_gives_the_documented_start(name):
    made = mixer(name)
    made.reset()
    for own, parameter in made.named_parameters():
        if own.endswith("_map"):
            assert torch.equal(parameter, torch.eye(D, F).double().expand_as(parameter))
        elif own in BEGIN.get(name.split()[0], {}):
            start = BEGIN[name.split()[0]][own]
            assert parameter.sigmoid().mean().item() == pytest.approx(start, abs=1e-4)
        else:
            assert torch.equal(parameter, torch.full_like(parameter, own == "alpha"))


# -- feature maps -------------------------------------------------------------------------------


@torch.no_grad()
def test_products_of_taylor_features_are_the_expansion():
    x, y = torch.randn(2, 7, 5, dtype=torch.float64)
    s = x @ y.mT
    found = taylor_map(x)
    assert found.shape == (7, 1 + 5 + 15)
    torch.testing.assert_close(found @ taylor_map(y).mT, 1 + s + s**2 / 2, **TIGHT)


@pytest.mark.parametrize("name", MAPS)
def test_maps_are_finite_for_any_input(name):
    y = torch.tensor([[1e4, -1e4, 0.0, 3.0]], requires_grad=True)
    out = MAPS[name](y)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(y.grad).all()
    assert name == "taylor" or out.min() >= 0


@torch.no_grad()
def test_maps_have_two_halves():
    y = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    eye = torch.eye(6, dtype=torch.float64).expand(4, 6, 6)
    torch.testing.assert_close(softmax_map(y), softmax_features(y, eye), **TIGHT)
    torch.testing.assert_close(exp_map(y), exp_features(y, eye), **TIGHT)
