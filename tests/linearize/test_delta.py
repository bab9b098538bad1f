"""The chunked gated delta rule is the recurrence that it says it is, in every mode."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3_next import modeling_qwen3_next as theirs

from surgery.models.linear_delta import delta_rule

B, H, K, V = 2, 2, 6, 5


def inputs(t, *, r=1, own=1, dtype=torch.float64, decay=0.3, seed=0):
    """Queries, keys of length 1, values, gates and betas; `own` states for r queries."""
    made = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    q, k = drawn(B, H, r, t, K), torch.nn.functional.normalize(drawn(B, H, own, t, K), dim=-1)
    gate = -decay * drawn(B, H, own, t, 1).abs()
    given = (q, k, drawn(B, H, own, t, V), gate, drawn(B, H, own, t, 1).sigmoid())
    return tuple(x.to(dtype) for x in given)


def one_by_one(q, k, v, gate, beta, *, docs=None):
    """The definition, a row, a head and a token at a time."""
    b, h, r, t = q.shape[:4]
    out = torch.zeros(b, h, r, t, V, dtype=q.dtype)
    for row, head, group in ((i, j, g) for i in range(b) for j in range(h) for g in range(r)):
        own = group if k.shape[2] == r else 0
        keys, values = k[row, head, own], v[row, head, own]
        state, doc = torch.zeros(K, V, dtype=q.dtype), None
        for i in range(t):
            now = 0 if docs is None else int(docs[row, i])
            if now < 0:
                continue
            if now != doc:
                state, doc = torch.zeros_like(state), now
            state = state * gate[row, head, own, i].exp()
            found = keys[i] @ state
            state = state + torch.outer(beta[row, head, own, i] * keys[i], values[i] - found)
            out[row, head, group, i] = q[row, head, group, i] @ state
    return out


def packed(t):
    """A row with padding on the left, and a row of three documents and padding at its end."""
    left = torch.full((t,), -1)
    left[t // 3 :] = 0
    cut = (torch.arange(t) * 3) // t
    cut[t - t // 8 :] = -1
    return torch.stack((left, cut))


@pytest.mark.parametrize("chunk", [1, 5, 16, 64])
@pytest.mark.parametrize("t", [1, 4, 16, 33, 70])
def test_it_is_the_recurrence(t, chunk):
    given = inputs(t)
    torch.testing.assert_close(
        delta_rule(*given, chunk=chunk)[0], one_by_one(*given), atol=1e-11, rtol=0
    )


@pytest.mark.parametrize(("r", "own"), [(3, 1), (3, 3)])
def test_query_heads_share_a_state_or_have_their_own(r, own):
    given = inputs(20, r=r, own=own)
    out, state = delta_rule(*given, chunk=8)
    torch.testing.assert_close(out, one_by_one(*given), atol=1e-11, rtol=0)
    assert state.sums.shape == (B, H, own, K, V)


@pytest.mark.parametrize("chunk", [4, 7, 64])
def test_documents_and_padding_part_the_tokens(chunk):
    given, docs = inputs(41), packed(41)
    out, state = delta_rule(*given, docs=docs, chunk=chunk)
    torch.testing.assert_close(out, one_by_one(*given, docs=docs), atol=1e-11, rtol=0)
    assert state.doc.tolist() == [0, 2]


def test_nothing_of_padding_counts_even_where_it_is_not_finite():
    given, docs = inputs(24), packed(24)
    out = delta_rule(*given, docs=docs, chunk=8)[0]
    gone = (docs < 0)[:, None, None, :, None]
    broken = [x.masked_fill(gone, torch.nan) for x in given]
    assert torch.equal(delta_rule(*broken, docs=docs, chunk=8)[0], out)


@pytest.mark.parametrize("docs", [None, "packed"])
@pytest.mark.parametrize("pieces", [(1,) * 40, (13, 1, 26), (39, 1), (8, 8, 8, 16)])
def test_going_on_from_a_state_is_going_through(pieces, docs):
    given, docs = inputs(40), packed(40) if docs else None
    whole, last = delta_rule(*given, docs=docs, chunk=8)
    outs, state, at = [], None, 0
    for piece in pieces:
        part = slice(at, at + piece)
        own = None if docs is None else docs[:, part]
        cut = (x[:, :, :, part] for x in given)
        out, state = delta_rule(*cut, state=state, docs=own, chunk=8)
        outs, at = [*outs, out], at + piece
    torch.testing.assert_close(torch.cat(outs, 3), whole, atol=1e-11, rtol=0)
    torch.testing.assert_close(state.sums, last.sums, atol=1e-11, rtol=0)
    assert torch.equal(state.doc, last.doc)


@pytest.mark.parametrize("name", ["chunk", "recurrent"])
def test_it_is_what_transformers_computes(name):
    given = inputs(100, dtype=torch.float32)
    q, k, v, gate, beta = (x[:, :, 0].transpose(1, 2) for x in given)
    run = getattr(theirs, f"torch_{name}_gated_delta_rule")
    wanted, last = run(q * K**0.5, k, v, g=gate[..., 0], beta=beta[..., 0], output_final_state=True)
    out, state = delta_rule(*given)
    torch.testing.assert_close(out[:, :, 0].transpose(1, 2), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state.sums[:, :, 0], last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("docs", [None, "packed"])
def test_gradients_are_those_of_the_function(docs):
    given = [x.requires_grad_() for x in inputs(11)]
    docs = packed(11) if docs else None

    def run(*given):
        out, state = delta_rule(*given, docs=docs, chunk=4)
        return out, state.sums

    assert torch.autograd.gradcheck(run, given)


GATES = {
    "gone at once": lambda gate: gate * 0 - 1e4,
    "minus infinity": lambda gate: gate.masked_fill(gate < gate.median(), -torch.inf),
    "one blow, then none": lambda gate: torch.where(
        torch.arange(gate.shape[3])[:, None] % 17 == 0, -3e4, gate * 1e-3
    ),
    "none": lambda gate: gate * 0,
}


@pytest.mark.parametrize("name", GATES)
def test_no_decay_is_too_strong(name):
    q, k, v, gate, beta = inputs(70)
    gate = GATES[name](gate)
    wanted = one_by_one(q, k, v, gate, beta)
    given = [x.float().requires_grad_() for x in (q, k, v, gate, beta)]
    out, state = delta_rule(*given)
    torch.testing.assert_close(out.double(), wanted, atol=2e-5, rtol=0)
    (out.square().sum() + state.sums.square().sum()).backward()
    assert all(x.grad.isfinite().all() for x in given)


def test_bfloat16_is_computed_in_float32():
    given = [x.bfloat16() for x in inputs(50)]
    out, state = delta_rule(*given)
    assert out.dtype == state.sums.dtype == torch.float32
    torch.testing.assert_close(out, delta_rule(*(x.float() for x in given))[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(delta_rule(*given)[0], out)


def test_what_follows_does_not_count():
    given = inputs(50)
    out = delta_rule(*given, chunk=16)[0]
    for t in (1, 15, 16, 17, 49):
        part = delta_rule(*(x[:, :, :, :t] for x in given), chunk=16)[0]
        torch.testing.assert_close(part, out[:, :, :, :t], atol=1e-12, rtol=0)
