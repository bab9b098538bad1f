"""Linear attention in chunks, against every query with every key."""

from __future__ import annotations

import pytest
import torch

from linearize import reference
from linearize.core_inputs import (
    CHUNK,
    GATES,
    LENGTHS,
    PADDED,
    B,
    H,
    K,
    V,
    close,
    documents,
    linear_inputs,
    parts,
)
from surgery.models.linear_core import linear_attention


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("t", LENGTHS)
@pytest.mark.parametrize("kind", GATES)
def test_it_is_what_every_query_gets_from_every_key(kind, t, shared, packed):
    q, k, v, gate = linear_inputs(t, kind, shared=shared)
    docs = documents(t) if packed else None
    out, state = linear_attention(q, k, v, gate, q_docs=docs, k_docs=docs, chunk=CHUNK)
    close(out, reference.linear(q, k, v, gate, q_docs=docs, k_docs=docs))
    close(state.sums, reference.last_sums(k, v, gate, docs=docs))


@pytest.mark.parametrize("chunk", [1, 5, 16, 64, 1000])
@pytest.mark.parametrize("kind", GATES)
def test_the_chunk_changes_nothing(kind, chunk):
    given, docs = linear_inputs(40, kind, dtype=torch.float64), documents(40)
    out, _ = linear_attention(*given, q_docs=docs, k_docs=docs, chunk=chunk)
    close(out, reference.linear(*given, q_docs=docs, k_docs=docs), tolerance=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", GATES)
def test_narrow_numbers_are_summed_in_float32(kind, dtype):
    given = linear_inputs(21, kind, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    out, state = linear_attention(*given, chunk=CHUNK)
    assert out.dtype == state.sums.dtype == wide
    close(out, reference.linear(*given), tolerance=1e-12 if wide == torch.float64 else 1e-5)


@pytest.mark.parametrize("kind", GATES)
def test_autocast_narrows_nothing(kind):
    given = linear_inputs(21, kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = linear_attention(*given, chunk=CHUNK)
    assert torch.equal(out, linear_attention(*given, chunk=CHUNK)[0])


@pytest.mark.parametrize("cuts", [(1,), (CHUNK,), (3, 20), tuple(range(1, 24))])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", GATES)
def test_any_split_of_the_tokens_gives_the_same(kind, packed, cuts):
    given, docs = linear_inputs(24, kind, dtype=torch.float64), documents(24) if packed else None
    whole, last = linear_attention(*given, q_docs=docs, k_docs=docs, chunk=CHUNK)
    state, outs = None, []
    for q, k, v, gate, told in zip(*(parts(x, cuts) for x in (*given, docs)), strict=True):
        out, state = linear_attention(
            q, k, v, gate, state=state, q_docs=told, k_docs=told, chunk=CHUNK
        )
        outs.append(out)
    close(torch.cat(outs, 3), whole, tolerance=1e-12)
    close(state.sums, last.sums, tolerance=1e-12)
    assert torch.equal(state.doc, last.doc)


@pytest.mark.parametrize("shift", [1, 3, CHUNK, 11, 30])
@pytest.mark.parametrize("packed", [False, True])
def test_shifted_keys_are_seen_from_that_many_tokens_on(shift, packed):
    t = 24
    q, k, v, _ = linear_inputs(t)
    docs = documents(t) if packed else torch.zeros(B, t, dtype=torch.long)
    k, v = (torch.nn.functional.pad(x, (0, 0, shift, 0))[:, :, :, :t] for x in (k, v))
    late = torch.nn.functional.pad(docs, (shift, 0), value=PADDED)[:, :t]
    out, _ = linear_attention(q, k, v, q_docs=docs, k_docs=late, chunk=CHUNK)
    q, k, v, _ = linear_inputs(t, dtype=torch.float64)
    far = torch.arange(t)[:, None] - torch.arange(t) >= shift
    same = (docs[..., None] == docs[:, None]) & (docs >= 0)[:, None]
    close(out, (q @ k.mT * (far & same)[:, None, None]) @ v)


def test_a_padded_token_neither_reads_nor_writes_nor_decays():
    given, docs = linear_inputs(12), torch.zeros(B, 12, dtype=torch.long)
    docs[:, 5:] = PADDED
    out, state = linear_attention(*given, q_docs=docs, k_docs=docs, chunk=CHUNK)
    short, before = linear_attention(*(x[:, :, :, :5] for x in given), chunk=CHUNK)
    assert not out[:, :, :, 5:].any()
    close(out[:, :, :, :5], short)
    close(state.sums, before.sums)
    assert torch.equal(state.doc, before.doc)


def test_rows_of_padding_alone_leave_the_state_empty():
    docs = torch.full((B, 12), PADDED)
    _, state = linear_attention(*linear_inputs(12), q_docs=docs, k_docs=docs, chunk=CHUNK)
    assert not state.sums.any()
    assert state.doc.tolist() == [-1] * B


@pytest.mark.parametrize("worst", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", GATES)
def test_what_lies_in_padding_is_never_touched(kind, worst):
    given, docs = linear_inputs(12, kind), documents(12)
    clean, _ = linear_attention(*given, q_docs=docs, k_docs=docs, chunk=CHUNK)
    absent = (docs == PADDED)[:, None, None, :, None]
    given = [None if x is None else x.masked_fill(absent, worst).requires_grad_() for x in given]
    out, _ = linear_attention(*given, q_docs=docs, k_docs=docs, chunk=CHUNK)
    assert torch.equal(out, clean)
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in given if x is not None)


@pytest.mark.parametrize("kind", GATES)
def test_keys_of_a_head_are_kept_once(kind):
    _, state = linear_attention(*linear_inputs(9, kind), chunk=CHUNK)
    assert state.sums.shape == (B, H, 1, K, V)


# -- gates and activations that break what is not stable --------------------------------------

HARD = {
    "open": torch.zeros_like,
    "strong": lambda g: torch.full_like(g, -15.0),
    "shut": lambda g: torch.full_like(g, -1e4),
    "forgotten": lambda g: torch.full_like(g, -torch.inf),
    "mixed": lambda g: torch.tensor([0.0, -15, -1e4, -1e-3])[
        torch.arange(g.numel()).mul(7).remainder(11).remainder(4)
    ].view_as(g),
}


@pytest.mark.parametrize("kind", ["scalar", "vector"])
@pytest.mark.parametrize("gates", HARD)
def test_hard_gates_are_exact_and_have_finite_gradients(gates, kind):
    q, k, v, gate = linear_inputs(40, kind)
    given = [x.requires_grad_() for x in (q, k, v, HARD[gates](gate))]
    out, state = linear_attention(*given, chunk=16)
    with torch.no_grad():
        close(out, reference.linear(*given))
    (out.sum() + state.sums.sum()).backward()
    assert all(x.grad.isfinite().all() for x in given)


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_a_small_decay_is_exact_after_strong_ones(kind):
    q, k, v, gate = linear_inputs(32, kind)
    gate[:, :, :, :20], gate[:, :, :, 20:] = -3e4, -1e-3
    close(linear_attention(q, k, v, gate, chunk=32)[0], reference.linear(q, k, v, gate))


@pytest.mark.parametrize("size", [1e4, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", GATES)
def test_large_and_small_activations_stay_finite(kind, dtype, size):
    q, k, v, gate = linear_inputs(24, kind)
    given = [(x * size).to(dtype).requires_grad_() for x in (q, k, v)]
    gate = None if gate is None else gate.to(dtype).requires_grad_()
    out, state = linear_attention(*given, gate, chunk=CHUNK)
    ((out / size).sum() + (state.sums / size).sum()).backward()
    assert out.isfinite().all()
    assert all(x.grad.isfinite().all() for x in (*given, *([] if gate is None else [gate])))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", GATES)
def test_the_state_holds_no_more_memory_than_it_says(kind, packed):
    docs = documents(40) if packed else None
    _, state = linear_attention(*linear_inputs(40, kind), q_docs=docs, k_docs=docs, chunk=CHUNK)
    for kept in state:
        assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()
