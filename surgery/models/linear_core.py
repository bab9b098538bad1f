"""Linear attention in chunks, and attention in a window: functions of tensors alone.

Axis letters: b rows, h KV heads, r query heads a KV head, t tokens, k width of keys, v of values,
d of both, n chunks, c tokens of a chunk.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

FORMAT = 1  # of what checkpoints hold; a change that old ones do not follow counts it up
BLOCK = 32  # queries taken at once, at least, where the window is narrow
NOWHERE = -2  # the document of keys that are padding: no query's


class State(NamedTuple):
    """What is kept of the tokens before.

    Attributes:
        sums: [b, h, r or 1, k, v], the sum of outer products of keys and values, decayed.
        doc: int64 [b], the document that they are of; -1 for none.
    """

    sums: Tensor
    doc: Tensor


class Windowed(NamedTuple):
    """Sums over a window: `num / den` is softmax attention.

    Attributes:
        num: [b, h, r, t, v], sum of exp(score - top) times the value.
        den: [b, h, r, t, 1], sum of exp(score - top).
        top: [b, h, r, t, 1], the highest score; 0 where no key is seen.
    """

    num: Tensor
    den: Tensor
    top: Tensor


class Anchors(NamedTuple):
    """Keys that stay in sight when the window has moved on (attention sinks).

    Attributes:
        k, v: [b, h, 1, n, width].
        docs: int64 [b, n], -1 for none.
        slots: int64 [b, n], places counted from the first key given with the queries.
    """

    k: Tensor
    v: Tensor
    docs: Tensor
    slots: Tensor


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    *,
    state: State | None = None,
    q_docs: Tensor | None = None,
    k_docs: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, State]:
    """Return `q_i S_i` with `S_i = exp(gate_i) S_{i-1} + k_i v_i^T`, linear in t.

    No scale and no normaliser: a column of ones in `v` gives the sum of weights. Decays are
    exponentials of sums of gates, never of differences of sums: none is above 1, and none is
    inexact after a strong one. Computed in float32, or float64 where that is given.

    Args:
        q: [b, h, r, t, k].
        k: [b, h, r or 1, t, k].
        v: [b, h, r or 1, t, v].
        gate: logarithms, at most 0 (-inf forgets all): [b, h, r or 1, t, 1], or with width k;
            None for none.
        state: of the tokens before.
        q_docs, k_docs: int64 [b, t], rising, -1 for padding; a query sees keys of its document
            alone. One of them None: document 0. Both: the document of the state.
        chunk: tokens taken at once, rounded up to a power of two.

    Returns:
        [b, h, r, t, v], and the state after the last token.

    Source: "Gated Linear Attention Transformers with Hardware-Efficient Training", arXiv
    2312.06635, sections 4.2 and 4.3; chunks under a vector gate are halved down to single tokens
    here, where the paper has blocks of 16.
    """
    t, wide = q.shape[3], torch.promote_types(q.dtype, torch.float32)
    size = 1 << (min(chunk, t) - 1).bit_length()
    docs = None
    if q_docs is not None or k_docs is not None:
        zeros = torch.zeros(q.shape[0], t, dtype=torch.long, device=q.device)
        asked, given = (zeros if x is None else x for x in (q_docs, k_docs))
        docs = _docs(asked, given, zeros[:, 0] - 1 if state is None else state.doc, size)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (_cut(x.to(wide), size) for x in (q, k, v))
        gate = None if gate is None else _cut(gate.to(wide), size)
        if docs is not None:
            # What lies in padding may be infinite, and no zero would mend that.
            q, k, v = (x.masked_fill(away, 0) for x, away in zip((q, k, v), docs.away, strict=True))
            gate = None if gate is None else gate.masked_fill(docs.away[1], 0)
        before, sums = _carry(k, v, gate, state, docs)
        asking = q if gate is None else q * gate.cumsum(4).exp()
        asking = asking if docs is None else asking.masked_fill(~docs.reads, 0)
        out = _times(asking, before) + _times(_weights(q, k, gate, docs), v)
    if docs is None:
        last = q.new_zeros(len(q), dtype=torch.long) if state is None else state.doc.clamp(min=0)
    else:
        last = docs.last
    return out.flatten(3, 4)[:, :, :, :t], State(sums, last)


class _Docs(NamedTuple):
    away: tuple[Tensor, Tensor, Tensor]  # [b, 1, 1, n, c, 1], no query, no key, no value
    same: Tensor  # [b, 1, 1, n, c, c], query and key of one document
    reads: Tensor  # [b, 1, 1, n, c, 1], queries of the document summed before their chunk
    joins: Tensor  # [b, 1, 1, n, c, 1], keys of the document summed after their chunk
    stays: Tensor  # [b, 1, 1, n, 1, 1], the document summed before a chunk is that after it
    last: Tensor  # [b], the document summed after all


def _docs(asked: Tensor, given: Tensor, first: Tensor, size: int) -> _Docs:
    """Who sees whom; documents rise, so that one alone is summed at any time."""
    rest = -asked.shape[1] % size
    asked, given = (
        torch.unflatten(pad(x, (0, rest), value=-1), 1, (-1, size)) for x in (asked, given)
    )
    after = torch.cat((first[:, None], given.amax(2)), 1).cummax(1).values
    before, after = after[:, :-1, None], after[:, 1:, None]
    idle, absent, reads, joins, stays = (
        x[:, None, None, ..., None]
        for x in (asked < 0, given < 0, asked == before, given == after, before == after)
    )
    same = (asked[..., :, None] == given[..., None, :])[:, None, None]
    return _Docs((idle, absent, absent), same, reads, joins, stays, after[:, -1, 0].clone())


def _cut(x: Tensor, size: int) -> Tensor:
    """Shapes: [b, h, r, t, w] to [b, h, r, n, size, w], zeros at the end."""
    return torch.unflatten(pad(x, (0, 0, 0, -x.shape[3] % size)), 3, (-1, size))


def _times(x: Tensor, y: Tensor) -> Tensor:
    """Return `x @ y`, the rows of all r together where `y` is one for them: no copies of it."""
    r = x.shape[2]
    if r == 1 or y.shape[2] > 1:
        return x @ y
    rows = x.movedim(2, -3)
    return torch.unflatten(rows.flatten(-3, -2) @ y[:, :, 0], -2, (r, -1)).movedim(-3, 2)


def _until_end(gate: Tensor) -> Tensor:
    """Sums of the gates after each token."""
    return pad(gate[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def _weights(q: Tensor, k: Tensor, gate: Tensor | None, docs: _Docs | None) -> Tensor:
    """What queries give to keys of their own chunk, [b, h, r, n, c, c]."""
    size = q.shape[4]
    seen = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    if gate is not None and gate.shape[-1] > 1:
        weights = _halved(q, k, gate)
    else:
        weights = _times(q, k.mT)
        if gate is not None:
            steps = gate.expand(*gate.shape[:-1], size).masked_fill(~seen.tril(-1), 0)
            weights = weights * steps.cumsum(-2).exp()
    return weights.masked_fill(~(seen if docs is None else seen & docs.same), 0)


def _halved(q: Tensor, k: Tensor, gate: Tensor) -> Tensor:
    """Products of queries and keys that decay in each dimension on its own, [b, h, r, n, c, c].

    Blocks double: keys of one half meet queries of the other at the border between them, so that
    both decays are products of gates.
    """
    weights = (q * k).sum(-1)[..., None, None]
    while weights.shape[-1] < q.shape[4]:
        half = weights.shape[-1]
        (_, asking), (given, _), (early, late) = (
            torch.unflatten(x, 4, (-1, 2, half)).unbind(5) for x in (q, k, gate)
        )
        met = _times(asking * late.cumsum(-2).exp(), (given * _until_end(early).exp()).mT)
        first, second = torch.unflatten(weights, 4, (-1, 2)).unbind(5)
        weights = torch.cat((pad(first, (0, half)), torch.cat((met, second), -1)), -2)
    return weights[:, :, :, :, 0]


def _carry(
    k: Tensor, v: Tensor, gate: Tensor | None, state: State | None, docs: _Docs | None
) -> tuple[Tensor, Tensor]:
    """The sums before every chunk, [b, h, r, n, k, v], and after the last."""
    k = k if gate is None else k * _until_end(gate).exp()
    k = k if docs is None else k.masked_fill(~docs.joins, 0)
    added = k.mT @ v
    sums = torch.zeros_like(added[:, :, :, 0]) if state is None else state.sums.to(added.dtype)
    chunks = added.shape[3]
    if gate is None and docs is None and chunks > 1:
        through = torch.cat((sums[:, :, :, None], added), 3).cumsum(3)
        return through[:, :, :, :-1], through[:, :, :, -1].clone()  # or all would be kept
    kept = added.new_ones(1, 1, 1, chunks, 1, 1) if gate is None else gate.sum(4)[..., None].exp()
    kept = kept if docs is None else kept.masked_fill(~docs.stays, 0)
    before = []
    for more, part in zip(added.unbind(3), kept.unbind(3), strict=True):
        before.append(sums)
        sums = torch.addcmul(more, sums, part)
    return torch.stack(before, 3) if chunks > 1 else before[0][:, :, :, None], sums


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    scale: float,
    lead: int = 0,
    q_docs: Tensor | None = None,
    k_docs: Tensor | None = None,
    anchors: Anchors | None = None,
) -> Windowed:
    """Return the sums of softmax attention over the last `window` slots, the query's own included.

    Blocks of queries against the keys that any of them sees: memory is linear in t.

    Args:
        q: [b, h, r, t, d].
        k, v: [b, h, 1, lead + t, width]; `lead` of them came before the queries' own.
        window: how many slots a query sees.
        scale: of the scores.
        lead: keys that come before the first query's own.
        q_docs: int64 [b, t], -1 for padding; None: all are of document 0.
        k_docs: int64 [b, lead + t].
        anchors: further keys, seen where they lie before the window.
    """
    b, t, wide = q.shape[0], q.shape[3], torch.promote_types(q.dtype, torch.float32)
    zeros = torch.zeros(b, lead + t, dtype=torch.long, device=q.device)
    reach = min(window, lead + t)
    size = min(max(reach, BLOCK), t)
    extra, rest = reach - 1 - lead, -t % size
    with torch.autocast(q.device.type, enabled=False):
        q = _cut(_there(q.to(wide), q_docs) * scale, size)
        k, v = (
            pad(_there(x.to(wide), k_docs), (0, 0, extra, rest)).unfold(3, reach - 1 + size, size)
            for x in (k, v)
        )
        asked, given = zeros[:, lead:] if q_docs is None else q_docs, _nowhere(k_docs, zeros)
        asked = torch.unflatten(pad(asked, (0, rest), value=-1), 1, (-1, size))
        given = pad(given, (extra, rest), value=NOWHERE).unfold(1, k.shape[-1], size)
        pairs = [(_masked(_times(q, k), asked, given, _band(size, reach, q.device)), v.mT)]
        if anchors is not None:
            slots = torch.arange(lead, lead + t + rest, device=q.device).reshape(-1, size)
            far = slots[..., None] - anchors.slots[:, None, None] >= window
            further, docs = _there(anchors.k.to(wide), anchors.docs), _nowhere(anchors.docs, zeros)
            scores = _masked(_times(q, further.mT[:, :, :, None]), asked, docs[:, None], far)
            pairs.append((scores, _there(anchors.v.to(wide), anchors.docs)[:, :, :, None]))
        found = _summed(pairs)
    return Windowed(*(x.flatten(3, 4)[:, :, :, :t] for x in found))


def _there(x: Tensor, docs: Tensor | None) -> Tensor:
    """Zeros for padding: it may be infinite."""
    return x if docs is None else x.masked_fill((docs < 0)[:, None, None, :, None], 0)


def _nowhere(docs: Tensor | None, zeros: Tensor) -> Tensor:
    return zeros if docs is None else docs.masked_fill(docs < 0, NOWHERE)


def _band(size: int, reach: int, device: torch.device) -> Tensor:
    """Which of `reach - 1 + size` keys lie in the window of each of `size` queries."""
    ones = torch.ones(size, reach - 1 + size, dtype=torch.bool, device=device)
    return ones.tril(reach - 1) & ones.triu()


def _masked(scores: Tensor, asked: Tensor, given: Tensor, near: Tensor) -> Tensor:
    """Scores of keys that are out of sight, or of another document, are lowest."""
    seen = (asked[..., :, None] == given[..., None, :]) & near
    return scores.masked_fill(~seen[:, None, None], -torch.inf)


def _summed(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over all pairs of scores and values."""
    tops = torch.cat([scores.amax(-1, keepdim=True) for scores, _ in pairs], -1)
    top = tops.amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0)
    weights = [(scores - top).exp() for scores, _ in pairs]
    num = [_times(w, values) for w, (_, values) in zip(weights, pairs, strict=True)]
    den = [w.sum(-1, keepdim=True) for w in weights]
    return sum(num[1:], num[0]), sum(den[1:], den[0]), top
