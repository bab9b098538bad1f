"""Linear attention in chunks, and attention in a window: functions of tensors alone.

Axis letters: b rows, h KV heads, r query heads a KV head, t tokens, k width of keys, v of values,
n chunks, c tokens of a chunk.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

FORMAT = 1  # of what checkpoints hold; a change that old ones do not follow counts it up
PART = 16  # tokens of a chunk whose products under a vector gate are taken one by one
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

    No scale and no normaliser: a column of ones in `v` gives the sum of weights. No exponent is
    above 0, whatever the gates. Computed in float32, or float64 where that is given.

    Args:
        q: [b, h, r, t, k].
        k: [b, h, r or 1, t, k].
        v: [b, h, r or 1, t, v].
        gate: logarithms, at most 0: [b, h, r or 1, t, 1] or [b, h, r or 1, t, k]; None for none.
        state: of the tokens before.
        q_docs, k_docs: int64 [b, t], rising, -1 for padding; a query sees keys of its document
            alone. None: all are of document 0.
        chunk: tokens taken at once.

    Returns:
        [b, h, r, t, v], and the state after the last token.

    Source: "Gated Linear Attention Transformers with Hardware-Efficient Training", arXiv
    2312.06635, sections 4.2 and 4.3.
    """
    t, wide = q.shape[3], torch.promote_types(q.dtype, torch.float32)
    size = min(chunk, t)
    told = None
    if q_docs is not None or k_docs is not None or t % size:
        told = _docs(q_docs, k_docs, t, size, state, q.to(wide))
    q, k, v = (_cut(x.to(wide), size) for x in (q, k, v))
    summed = None if gate is None else _cut(gate.to(wide), size)
    if told is not None:
        k = k * told.real
        summed = None if summed is None else summed * told.real
    summed = None if summed is None else summed.cumsum(4)
    before, sums = _carry(k, v, summed, state, told)
    across = (q if summed is None else q * summed.exp()) @ before
    if told is not None:
        across = across * told.reads
    out = across + _inside(q, k, v, summed, None if told is None else told.same)
    last = q.new_zeros(q.shape[0], dtype=torch.long) if told is None else told.last
    return out.flatten(3, 4)[:, :, :, :t], State(sums, last)


class _Docs(NamedTuple):
    real: Tensor  # [b, 1, 1, n, c, 1], 1 for keys that are there
    same: Tensor  # [b, 1, 1, n, c, c], query and key of one document
    reads: Tensor  # [b, 1, 1, n, c, 1], 1 where a query is of the document summed before its chunk
    joins: Tensor  # [b, 1, 1, n, c, 1], 1 where a key is of the document summed after its chunk
    stays: Tensor  # [b, n], whether the document summed before a chunk is that after it
    last: Tensor  # [b], the document summed after all


def _docs(  # noqa: PLR0917
    q_docs: Tensor | None,
    k_docs: Tensor | None,
    t: int,
    size: int,
    state: State | None,
    like: Tensor,
) -> _Docs:
    """Who sees whom; documents rise, so that one alone is summed at any time."""
    zeros = torch.zeros(like.shape[0], t, dtype=torch.long, device=like.device)
    rest = -t % size
    asked, given = (
        pad(zeros if docs is None else docs, (0, rest), value=-1).unflatten(1, (-1, size))
        for docs in (q_docs, k_docs)
    )
    first = zeros[:, :1] - 1 if state is None else state.doc[:, None]
    after = torch.cat((first, given.amax(2)), 1).cummax(1).values
    before, after = after[:, :-1, None], after[:, 1:, None]
    numbers = like.dtype
    return _Docs(
        real=(given >= 0).to(numbers)[:, None, None, ..., None],
        same=((asked[..., :, None] == given[..., None, :]) & (given >= 0)[..., None, :])[
            :, None, None
        ],
        reads=((asked == before) & (asked >= 0)).to(numbers)[:, None, None, ..., None],
        joins=(given == after).to(numbers)[:, None, None, ..., None],
        stays=(before == after)[..., 0],
        last=after[:, -1, 0],
    )


def _cut(x: Tensor, size: int) -> Tensor:
    """Shapes: [b, h, r, t, w] to [b, h, r, n, size, w], zeros at the end."""
    return pad(x, (0, 0, 0, -x.shape[3] % size)).unflatten(3, (-1, size))


def _inside(q: Tensor, k: Tensor, v: Tensor, summed: Tensor | None, same: Tensor | None) -> Tensor:
    """What queries read from keys of their own chunk."""
    size = q.shape[4]
    seen = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    seen = seen if same is None else seen & same
    if summed is None:
        return (q @ k.mT).masked_fill(~seen, 0) @ v
    if summed.shape[-1] == 1:
        fall = (summed - summed.mT).masked_fill(~seen, -torch.inf)
        return (q @ k.mT * fall.exp()) @ v
    return _products(q, k, summed).masked_fill(~seen, 0) @ v


def _products(q: Tensor, k: Tensor, summed: Tensor) -> Tensor:
    """Products of queries and keys, each dimension with its own decay: [b, h, r, n, c, c].

    Parts of 16 tokens meet over the decay at the border before the queries' part, so that both
    exponents are at most 0; within a part they are taken one by one.
    """
    size = q.shape[4]
    rows = []
    for start in range(0, size, PART):
        end = min(start + PART, size)
        here, own = summed[..., start:end, :], k[..., start:end, :]
        fall = here[..., :, None, :] - here[..., None, :, :]
        later = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
        fall = fall.masked_fill(later[..., None], -torch.inf).exp()
        asked = q[..., start:end, :]
        row = [((asked[..., :, None, :] * fall) * own[..., None, :, :]).sum(-1)]
        if start:
            border = summed[..., start - 1 : start, :]
            far = k[..., :start, :] * (border - summed[..., :start, :]).exp()
            row.insert(0, (asked * (here - border).exp()) @ far.mT)
        if end < size:
            row.append(row[0].new_zeros(*row[0].shape[:-1], size - end))
        rows.append(torch.cat(row, -1))
    return torch.cat(rows, -2)


def _carry(
    k: Tensor, v: Tensor, summed: Tensor | None, state: State | None, docs: _Docs | None
) -> tuple[Tensor, Tensor]:
    """The sums before every chunk, [b, h, r, n, k, v], and after the last."""
    if summed is not None:
        k = k * (summed[..., -1:, :] - summed).exp()
    if docs is not None:
        k = k * docs.joins
    added = k.mT @ v
    sums = torch.zeros_like(added[:, :, :, 0]) if state is None else state.sums.to(added.dtype)
    if summed is None and docs is None:
        through = added.cumsum(3) + sums[:, :, :, None]
        return torch.cat((sums[:, :, :, None], through[:, :, :, :-1]), 3), through[:, :, :, -1]
    before = []
    for n in range(added.shape[3]):
        before.append(sums)
        if summed is not None:
            sums = sums * summed[..., n, -1, :, None].exp()
        if docs is not None:
            sums = sums * docs.stays[:, n].to(sums.dtype)[:, None, None, None, None]
        sums = sums + added[:, :, :, n]
    return torch.stack(before, 3), sums


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
        q_docs: int64 [b, t], -1 for padding; None: all are of document 0.
        k_docs: int64 [b, lead + t].
        anchors: further keys, seen where they lie before the window.
    """
    b, _, _, t, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(wide) * scale, k.to(wide), v.to(wide)
    if q_docs is None:
        q_docs = torch.zeros(b, t, dtype=torch.long, device=q.device)
    if k_docs is None:
        k_docs = torch.zeros(b, lead + t, dtype=torch.long, device=q.device)
    size = min(window, t)
    rest = -t % size
    extra = window - lead  # so that every query has a whole window before it
    k, v = (_shifted(x, extra, rest) for x in (k, v))
    k_docs = k_docs.masked_fill(k_docs < 0, NOWHERE)[:, max(-extra, 0) :]
    k_docs = pad(k_docs, (max(extra, 0), rest), value=NOWHERE)
    q = pad(q, (0, 0, 0, rest)).unflatten(3, (-1, size))
    asked = pad(q_docs, (0, rest), value=-1).unflatten(1, (-1, size))
    keys, values = (x.unfold(3, window + size, size) for x in (k, v))
    given = k_docs.unfold(1, window + size, size)
    place = torch.arange(size, device=q.device)[:, None] + window
    apart = place - torch.arange(window + size, device=q.device)
    seen = (apart >= 0) & (apart < window) & (asked[..., :, None] == given[..., None, :])
    scores = (q @ keys).masked_fill(~seen[:, None, None], -torch.inf)
    held = None
    if anchors is not None:
        held = anchors.v.to(wide)[:, :, :, None]
        slots = torch.arange(t + rest, device=q.device).unflatten(0, (-1, size)) + lead
        ready = slots[..., None] - anchors.slots[:, None, None] >= window
        docs = anchors.docs.masked_fill(anchors.docs < 0, NOWHERE)
        ready = ready & (asked[..., None] == docs[:, None, None])
        more = q @ anchors.k.to(wide).mT[:, :, :, None]
        scores = torch.cat((scores, more.masked_fill(~ready[:, None, None], -torch.inf)), -1)
    top = scores.amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0)
    weights = (scores - top).exp()
    num = weights[..., : window + size] @ values.mT
    if held is not None:
        num = num + weights[..., window + size :] @ held
    den = weights.sum(-1, keepdim=True)
    return Windowed(*(x.flatten(3, 4)[:, :, :, :t] for x in (num, den, top)))


def _shifted(x: Tensor, extra: int, rest: int) -> Tensor:
    """Let the keys begin `extra` slots earlier (later, where negative), with zeros."""
    return pad(x[:, :, :, max(-extra, 0) :], (0, 0, max(extra, 0), rest))
