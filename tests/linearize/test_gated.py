"""Mixers with learned decays: as published, and the same function in every mode."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from surgery.models.linear_core import State
from surgery.models.linear_gated import GATED
from surgery.models.linear_seen import Past, Seen, Shape

HIDDEN, HEADS, KV, D = 20, 4, 2, 6
T = 75  # longer than a chunk, and no multiple of anything


def mixer(method, *, seed=0, dtype=torch.float64, kv_heads=KV):
    """A mixer all of whose parameters are drawn."""
    shape = Shape(hidden=HIDDEN, heads=HEADS, kv_heads=kv_heads, head_dim=D, scale=D**-0.5)
    made = GATED[method]({"method": method}, shape).to(dtype)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.7)
    return made


def seen(t=T, *, docs=None, kv_heads=KV, dtype=torch.float64, seed=1):
    """What a layer gives its mixer; rotated queries and keys are none of these mixers' business."""
    made = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=made, dtype=torch.float64).to(dtype)

    q = drawn(2, kv_heads, HEADS // kv_heads, t, D)
    k, v = drawn(2, kv_heads, 1, t, D), drawn(2, kv_heads, 1, t, D)
    nothing = torch.full_like(q, torch.nan)
    return Seen(drawn(2, t, HIDDEN), q, k, v, nothing, nothing, docs)


def part(given, at, docs=None):
    """Some of the tokens."""
    cut = [x[..., at, :] for x in (given.q, given.k, given.v, given.q_rope, given.k_rope)]
    return Seen(given.x[:, at], *cut, docs)


def silu(x):
    return x / (1 + (-x).exp())


def finish(made, head, out, x):
    """Norm over a head, times the gate."""
    gate = made.gate.weight[head * D : (head + 1) * D] @ x
    return out / (out.square().mean() + made.shape.eps).sqrt() * made.norm * silu(gate)


def gla_by_hand(made, given, row, head):
    """One query head, a token at a time."""
    own, group = divmod(head, HEADS // KV)
    state, outs, rows = torch.zeros(D, D, dtype=torch.float64), [], slice(own * D, (own + 1) * D)
    for i, x in enumerate(given.x[row]):
        low = made.decay_in.weight @ x
        gate = (made.decay_out.weight[rows] @ low + made.decay_out.bias[rows]).sigmoid().log() / 16
        state = gate.exp()[:, None] * state
        state = state + torch.outer(given.k[row, own, 0, i], given.v[row, own, 0, i])
        outs.append(finish(made, head, given.q[row, own, group, i] / D**0.5 @ state, x))
    return torch.stack(outs)


def delta_by_hand(made, given, row, head):
    """One query head, a token at a time."""
    own, group = divmod(head, HEADS // KV)

    def convolved(values, taps, at):
        return silu(sum(values[at - 3 + j] * taps[:, j] for j in range(4) if at - 3 + j >= 0))

    def unit(x):
        return x / (x.square().sum() + 1e-6).sqrt()

    def channels(n):
        return slice(n * D, (n + 1) * D)

    state, outs = torch.zeros(D, D, dtype=torch.float64), []
    for i, x in enumerate(given.x[row]):
        q = unit(convolved(given.q[row, own, group], made.conv_q[channels(head)], i)) / D**0.5
        k = unit(convolved(given.k[row, own, 0], made.conv_k[channels(own)], i))
        v = convolved(given.v[row, own, 0], made.conv_v[channels(own)], i)
        step = (1 + (made.decay.weight[own] @ x + made.dt_bias[own]).exp()).log()
        beta = (made.beta.weight[own] @ x).sigmoid()
        state = (-made.A_log[own].exp() * step).exp() * state
        state = state + beta * torch.outer(k, v - k @ state)
        outs.append(finish(made, head, q @ state, x))
    return torch.stack(outs)


BY_HAND = {"gla": gla_by_hand, "gated-delta": delta_by_hand}
methods = pytest.mark.parametrize("method", GATED)


@methods
@torch.no_grad()
def test_it_is_the_recurrence(method):
    made, given = mixer(method), seen()
    found = made(given, None).view(2, T, HEADS, D)
    for row, head in ((0, 0), (0, 1), (1, 2), (1, 3)):
        wanted = BY_HAND[method](made, given, row, head)
        torch.testing.assert_close(found[row, :, head], wanted, atol=1e-10, rtol=0)


@methods
@pytest.mark.parametrize("pieces", [(1,) * T, (2, 1, 1, 64, 7), (T - 1, 1)])
@torch.no_grad()
def test_pieces_are_the_whole(method, pieces):
    made, given = mixer(method), seen()
    past, outs, at = Past(), [], 0
    for piece in pieces:
        outs.append(made(part(given, slice(at, at + piece)), past))
        at += piece
    torch.testing.assert_close(torch.cat(outs, 1), made(given, None), atol=1e-10, rtol=0)


@methods
@pytest.mark.parametrize("pieces", [(T,), (4, T - 4), (2, 1, 1, 64, 7)])
@torch.no_grad()
def test_padding_on_the_left_does_not_count(method, pieces):
    made, given, gone = mixer(method), seen(), (0, 3)
    real = torch.arange(T) >= torch.tensor(gone)[:, None]
    past, outs, at = Past(), [], 0
    for piece in pieces:
        own = slice(at, at + piece)
        docs = None if real[:, own].all() else real[:, own].long() - 1
        outs.append(made(part(given, own, docs), past))
        at += piece
    found = torch.cat(outs, 1)
    for row, n in enumerate(gone):
        alone = made(part(given, slice(n, T)), None)[row]
        torch.testing.assert_close(found[row, n:], alone, atol=1e-10, rtol=0)


@methods
@torch.no_grad()
def test_packed_documents_do_not_see_one_another(method):
    made, given, cuts = mixer(method), seen(), (0, 2, 33, T)
    docs = torch.zeros(2, T, dtype=torch.int64)
    docs[:, 2:], docs[:, 33:] = 1, 2
    found = made(part(given, slice(None), docs), None)
    for start, end in pairwise(cuts):
        alone = made(part(given, slice(start, end)), None)
        torch.testing.assert_close(found[:, start:end], alone, atol=1e-10, rtol=0)


@methods
@torch.no_grad()
def test_the_state_does_not_grow(method):
    made, given, past = mixer(method), seen(), Past()
    sizes = []
    for t in range(4, 12):
        made(part(given, slice(t, t + 1)), past)
        sizes.append({name: x.shape for name, x in past.tensors.items()})
    assert all(size == sizes[0] for size in sizes)
    assert past.tensors["sums"].shape == (2, KV, 1, D, D)  # query heads share it
    assert all(len(x) == 2 for x in past.tensors.values())


@methods
def test_every_parameter_has_a_gradient_in_bfloat16_too(method):
    made, given = mixer(method, dtype=torch.bfloat16), seen(dtype=torch.bfloat16)
    out = made(given, None)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@methods
def test_gradients_are_those_of_the_function(method):
    made, given = mixer(method), seen(7)
    names = [name for name, _ in made.named_parameters()]

    def run(x, q, k, v, *numbers):
        own = Seen(x, q, k, v, q, k, None)
        return torch.func.functional_call(made, dict(zip(names, numbers, strict=True)), (own, None))

    start = [given.x, given.q, given.k, given.v, *(p.detach() for p in made.parameters())]
    assert torch.autograd.gradcheck(run, [x.clone().requires_grad_() for x in start])


@methods
@torch.no_grad()
def test_an_untrained_layer_speaks_softly_and_remembers(method):
    made, given = mixer(method), seen()
    made.reset()
    out = made(given, None)
    assert 0.01 < out.square().mean().sqrt() < 0.2
    past = Past()
    made(part(given, slice(0, 1)), past)
    first = past.tensors["sums"]
    silent = part(given, slice(1, 5))
    made(Seen(silent.x, silent.q, 0 * silent.k, silent.v, *[silent.q] * 2, None), past)
    left = (past.tensors["sums"].norm() / first.norm()).item()
    assert left == pytest.approx({"gla": 0.5 ** (4 / 16), "gated-delta": 0.9606}[method], abs=1e-3)


@methods
def test_without_its_linear_branch_nothing_is_left(method):
    made = mixer(method)
    made.spec = {**made.spec, "linear_branch": False}
    assert not made(seen(), None).any()


def test_initial_taps_pass_each_token_through():
    made = mixer("gated-delta")
    made.reset()
    for taps in (made.conv_q, made.conv_k, made.conv_v):
        assert torch.equal(taps, torch.tensor([0.0, 0, 0, 1]).expand_as(taps).to(taps))


@pytest.mark.parametrize("state", ["", "_h0"])
@pytest.mark.parametrize("case", ["fla_gla", "fla_gla_strong_decay"])
@torch.no_grad()
def test_gla_is_what_the_published_code_computes(test_data, case, state):
    found = load_file(test_data / "oracle" / "linearization.safetensors")
    told = json.loads((test_data / "oracle" / "linearization.json").read_text())
    assert "scale=K**-0.5" in told["cases"]["fla_gla"]["note"]
    if f"{case}.o{state}" not in found:
        pytest.skip("not measured")
    q, k, v = (found[f"fla_gla.{name}"].transpose(1, 2) for name in "qkv")
    gates = found[f"{case}.gk"]
    d = q.shape[-1]
    made = GATED["gla"]({}, Shape(hidden=2 * d, heads=2, kv_heads=2, head_dim=d, scale=d**-0.5))
    made.decay_in = made.decay_out = nn.Identity()
    x = torch.special.logit((16 * gates.double()).exp()).flatten(2)
    doc = torch.zeros(len(q), dtype=torch.int64)
    begin = State(found["fla_gla.h0"][:, :, None], doc) if state else None
    given = Seen(x, q[:, :, None], k[:, :, None], v[:, :, None], q, k, None)
    out, end = made.mix(given, begin, None)
    wanted, last = found[f"{case}.o{state}"], found[f"{case}.ht{state}"]
    torch.testing.assert_close(out[:, :, 0].transpose(1, 2).float(), wanted, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(end.sums[:, :, 0].float(), last, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kv_heads", [HEADS, KV, 1])
@torch.no_grad()
def test_gated_delta_is_the_layer_of_transformers(kv_heads):
    made = mixer("gated-delta", dtype=torch.float32, kv_heads=kv_heads)
    torch.manual_seed(3)
    projections = [torch.randn(n * D, HIDDEN) / 4 for n in (HEADS, kv_heads, kv_heads)]
    layer = their_layer(made, projections)
    x = torch.randn(2, T, HIDDEN)
    mask = torch.ones(2, T)
    mask[0, :9] = 0
    q, k, v = ((x @ w.T).unflatten(-1, (-1, D)).transpose(1, 2) for w in projections)
    q = q.unflatten(1, (kv_heads, HEADS // kv_heads))
    given = Seen(x, q, k[:, :, None], v[:, :, None], q, k, mask.long() - 1)
    found, wanted = made(given, None), layer(x, attention_mask=mask)
    real = mask.bool()
    # The norm magnifies rounding where a head's output is near 0.
    torch.testing.assert_close(found[real], wanted[real], atol=5e-4, rtol=1e-5)


def their_layer(made, projections):
    """The layer of transformers with the numbers of a mixer; its output projection is none."""
    kv_heads, hidden = made.shape.kv_heads, HIDDEN
    config = Qwen3NextConfig(
        hidden_size=hidden, rms_norm_eps=made.shape.eps, num_hidden_layers=1,
        linear_num_key_heads=HEADS, linear_num_value_heads=HEADS, linear_key_head_dim=D,
        linear_value_head_dim=D, layer_types=["linear_attention"], head_dim=D,
    )  # fmt: skip
    layer = Qwen3NextGatedDeltaNet(config, 0)

    def repeated(x, width):
        return x.unflatten(0, (-1, width)).repeat_interleave(HEADS * width // len(x), 0)

    q, k, v = (repeated(w, D) for w in projections)
    z = repeated(made.gate.weight, D)
    layer.in_proj_qkvz.weight = nn.Parameter(torch.cat((q, k, v, z), 1).flatten(0, 1))
    b, a = repeated(made.beta.weight, 1), repeated(made.decay.weight, 1)
    layer.in_proj_ba.weight = nn.Parameter(torch.cat((b, a), 1).flatten(0, 1))
    convs = [repeated(x, D).flatten(0, 1) for x in (made.conv_q, made.conv_k, made.conv_v)]
    layer.conv1d.weight = nn.Parameter(torch.cat(convs)[:, None])
    layer.A_log = nn.Parameter(made.A_log.repeat_interleave(HEADS // kv_heads))
    layer.dt_bias = nn.Parameter(made.dt_bias.repeat_interleave(HEADS // kv_heads))
    layer.norm.weight = nn.Parameter(made.norm)
    layer.out_proj = nn.Identity()
    return layer
