"""What holds of both cores: no look ahead, gradients, memory linear in length."""

from __future__ import annotations

import pytest
import torch

from linearize.core_inputs import (
    CHUNK,
    GATES,
    WINDOW,
    B,
    K,
    V,
    anchors,
    close,
    documents,
    linear_inputs,
    seeded,
    window_inputs,
)
from surgery.models.linear_core import Anchors, State, linear_attention, window_attention


@pytest.mark.parametrize("t", [1, 9, CHUNK, 24])
@pytest.mark.parametrize("kind", [*GATES, "window"])
def test_nothing_depends_on_what_follows(kind, t):
    total = 41
    if kind == "window":
        q, k, v = window_inputs(total, 0)
        whole = window_attention(q, k, v, window=WINDOW, scale=0.5).num
        cut = (x[:, :, :, :t] for x in (q, k, v))
        close(window_attention(*cut, window=WINDOW, scale=0.5).num, whole[:, :, :, :t])
        return
    given = linear_inputs(total, kind)
    cut = (None if x is None else x[:, :, :, :t] for x in given)
    whole, _ = linear_attention(*given, chunk=CHUNK)
    close(linear_attention(*cut, chunk=CHUNK)[0], whole[:, :, :, :t])


@pytest.mark.parametrize("kind", [*GATES, "window"])
def test_later_tokens_change_no_bit(kind):
    total, t = 41, 22
    given = window_inputs(total, 0) if kind == "window" else linear_inputs(total, kind)

    def run(given):
        if kind == "window":
            return window_attention(*given, window=WINDOW, scale=0.5).num[:, :, :, :t]
        return linear_attention(*given, chunk=CHUNK)[0][:, :, :, :t]

    before = run(given)
    for x in given:
        if x is not None:
            x[:, :, :, t:] = -1e3
    assert torch.equal(run(given), before)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", GATES)
def test_gradients_of_linear_attention(kind, packed):
    t = 7
    given = [None if x is None else x[:, :1, :2].double() for x in linear_inputs(t, kind)]
    docs = documents(t) if packed else None
    sums = seeded(B, 1, 1, K, V, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (*given, sums) if x is not None]

    def run(q, k, v, *rest):
        gate = rest[0] if len(rest) > 1 else None
        state = State(rest[-1], torch.zeros(B, dtype=torch.long))
        out, after = linear_attention(q, k, v, gate, state=state, q_docs=docs, k_docs=docs, chunk=4)
        return out, after.sums

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
def test_gradients_of_the_window(sinks, packed):
    t, docs = 5, documents(5) if packed else None
    q, k, v = (x[:, :1, :2].requires_grad_() for x in window_inputs(t, 0, torch.float64))
    held = anchors(torch.float64)
    far = [x[:, :1].requires_grad_() for x in held[:2]] if sinks else []

    def run(q, k, v, *far):
        told = {"q_docs": docs, "k_docs": docs}
        told |= {"anchors": Anchors(*far, held.docs, held.slots)} if sinks else {}
        return window_attention(q, k, v, window=3, scale=0.5, **told)

    assert torch.autograd.gradcheck(run, [q, k, v, *far])


def saved_bytes(run):
    """Bytes held for the backward pass, each storage once."""
    held = {}

    def keep(x):
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = run()
    assert out.requires_grad
    return sum(held.values())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [*GATES, "window"])
def test_memory_of_training_is_linear_in_length(kind, packed):
    def held(t):
        docs = documents(t) if packed else None
        told = {"q_docs": docs, "k_docs": docs}
        if kind == "window":
            given = [x.requires_grad_() for x in window_inputs(t, 0)]
            return saved_bytes(lambda: window_attention(*given, window=32, scale=1, **told).num)
        given = [None if x is None else x.requires_grad_() for x in linear_inputs(t, kind)]
        return saved_bytes(lambda: linear_attention(*given, **told)[0])

    assert held(2048) == pytest.approx(2 * held(1024), rel=0.02)
