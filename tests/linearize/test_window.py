"""Attention in a window, against the whole matrix of scores."""

from __future__ import annotations

import pytest
import torch

from linearize import reference
from linearize.core_inputs import LEAD, PADDED, WINDOW, B, anchors, close, documents, window_inputs
from surgery.models.linear_core import window_attention


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lead", [0, WINDOW - 1, WINDOW, 3 * WINDOW])
@pytest.mark.parametrize("t", [1, 4, WINDOW, 40, 64])
def test_the_window_is_softmax_over_what_it_sees(t, lead, packed, sinks):
    q, k, v = window_inputs(t, lead)
    docs = documents(lead + t) if packed else None
    told = {"q_docs": docs[:, lead:], "k_docs": docs} if packed else {}
    told |= {"anchors": anchors()} if sinks else {}
    found = window_attention(q, k, v, window=WINDOW, scale=0.5, lead=lead, **told)
    wanted = reference.window(q, k, v, window=WINDOW, scale=0.5, lead=lead, **told)
    for mine, theirs in zip(found, wanted, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("window", [1, 2, 33, 39, 40, 1000])
def test_any_window_does(window):
    q, k, v = window_inputs(40, 0)
    num, den, _ = window_attention(q, k, v, window=window, scale=0.5)
    far = torch.arange(40)[:, None] - torch.arange(40)
    seen = (far >= 0) & (far < window)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.5)
    close(num / den, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_narrow_numbers_are_compared_in_float32(dtype):
    given = window_inputs(40, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = window_attention(*given, window=WINDOW, scale=0.5, lead=LEAD)
    wanted = reference.window(*given, window=WINDOW, scale=0.5, lead=LEAD)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == torch.promote_types(dtype, torch.float32)
        close(mine, theirs)


@pytest.mark.parametrize("cuts", [(1,), (3, 20), tuple(range(1, 24))])
@pytest.mark.parametrize("packed", [False, True])
def test_any_split_of_the_queries_gives_the_same(packed, cuts):
    t = 24
    (q, k, v), docs = window_inputs(t, 0), documents(t) if packed else None
    whole = window_attention(q, k, v, window=WINDOW, scale=0.5, q_docs=docs, k_docs=docs)
    outs = []
    for start, end in zip((0, *cuts), (*cuts, t), strict=True):
        lead = min(start, WINDOW - 1)
        near = slice(start - lead, end)
        told = {} if docs is None else {"q_docs": docs[:, start:end], "k_docs": docs[:, near]}
        asked, keys, values = q[:, :, :, start:end], k[:, :, :, near], v[:, :, :, near]
        outs.append(
            window_attention(asked, keys, values, window=WINDOW, scale=0.5, lead=lead, **told)
        )
    for pieces, wanted in zip(zip(*outs, strict=True), whole, strict=True):
        close(torch.cat(pieces, 3), wanted)


def test_a_query_without_keys_sums_to_nothing():
    q, k, v = window_inputs(12, 0)
    docs = torch.full((B, 12), PADDED)
    for found in window_attention(q, k, v, window=WINDOW, scale=0.5, q_docs=docs, k_docs=docs):
        assert not found.any()


@pytest.mark.parametrize("worst", [torch.nan, torch.inf])
def test_the_window_never_touches_padding(worst):
    given, docs = window_inputs(12, 0), documents(12)
    told = {"window": WINDOW, "scale": 0.5, "q_docs": docs, "k_docs": docs}
    clean = window_attention(*given, **told)
    absent = (docs == PADDED)[:, None, None, :, None]
    given = [x.masked_fill(absent, worst).requires_grad_() for x in given]
    found = window_attention(*given, **told)
    assert all(torch.equal(x, y) for x, y in zip(found, clean, strict=True))
    sum(x.sum() for x in found).backward()
    assert all(x.grad.isfinite().all() for x in given)


@pytest.mark.parametrize("size", [1e4, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_window_stays_finite(dtype, size):
    given = [(x * size).to(dtype).requires_grad_() for x in window_inputs(24)]
    num, den, top = window_attention(*given, window=WINDOW, scale=0.5, lead=LEAD)
    (num / den + den).sum().backward()
    assert all(x.isfinite().all() for x in (num, den, top, *(x.grad for x in given)))
