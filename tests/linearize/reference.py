"""Attention in float64, straight from the equations: every query against every key, no chunks."""

from __future__ import annotations

import torch
from torch import Tensor


def documents(docs: Tensor | None, rows: int, t: int) -> Tensor:
    return torch.zeros(rows, t, dtype=torch.long) if docs is None else docs


def linear(q, k, v, gate=None, *, q_docs=None, k_docs=None) -> Tensor:
    """Sum over keys j <= i, of query i's document, of (q_i exp(gates j+1..i) . k_j) v_j."""
    b, h, r, t, _ = q.shape
    q, k, v = (x.double().expand(b, h, r, *x.shape[3:]) for x in (q, k, v))
    q_docs, k_docs = documents(q_docs, b, t), documents(k_docs, b, t)
    out = q.new_zeros(b, h, r, t, v.shape[-1])
    for row in range(b):
        for i in range(t):
            for j in range(i + 1):
                if q_docs[row, i] != k_docs[row, j] or k_docs[row, j] < 0:
                    continue
                decay = 1
                if gate is not None:
                    real = (k_docs[row, j + 1 : i + 1] >= 0)[:, None]
                    gates = gate.double()[row, :, :, j + 1 : i + 1].masked_fill(~real, 0)
                    decay = gates.sum(-2).exp()
                weight = (q[row, :, :, i] * decay * k[row, :, :, j]).sum(-1, keepdim=True)
                out[row, :, :, i] += weight * v[row, :, :, j]
    return out


def last_sums(k, v, gate=None, *, docs=None) -> Tensor:
    """The state after the last token, a step at a time, [b, h, r, k, v]."""
    b, h, r = (max(x.shape[n] for x in (k, v, k if gate is None else gate)) for n in range(3))
    t = k.shape[3]
    docs = documents(docs, b, t)
    sums = torch.zeros(b, h, r, k.shape[-1], v.shape[-1], dtype=torch.float64)
    for row in range(b):
        held = -1
        for i in range(t):
            doc = int(docs[row, i])
            if doc < 0:
                continue
            if doc != held:
                sums[row], held = 0, doc
            if gate is not None:
                sums[row] *= gate.double()[row, :, :, i, :, None].exp()
            outer = k.double()[row, :, :, i, :, None] * v.double()[row, :, :, i, None, :]
            sums[row] += outer
    return sums


def window(q, k, v, *, window, scale, lead=0, q_docs=None, k_docs=None, anchors=None):
    """Numerator, denominator and top of softmax attention, over the whole matrix of scores."""
    b, _, _, t, _ = q.shape
    q_docs, k_docs = documents(q_docs, b, t), documents(k_docs, b, lead + t)
    apart = torch.arange(lead, lead + t)[:, None] - torch.arange(lead + t)
    seen = ((apart >= 0) & (apart < window)).expand(b, t, lead + t)
    slots, k, v = torch.arange(lead + t).expand(b, -1), k.double(), v.double()
    if anchors is not None:
        slots = torch.cat((slots, anchors.slots), 1)
        k_docs = torch.cat((k_docs, anchors.docs), 1)
        k, v = torch.cat((k, anchors.k.double()), 3), torch.cat((v, anchors.v.double()), 3)
        before = torch.arange(lead, lead + t)[:, None] - anchors.slots[:, None] >= window
        seen = torch.cat((seen, before), 2)
    seen = seen & (q_docs[..., None] == k_docs[:, None]) & (k_docs >= 0)[:, None]
    seen = seen[:, None, None]
    scores = (q.double() @ k.mT * scale).masked_fill(~seen, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    top = torch.where(seen.any(-1, keepdim=True), top, torch.zeros_like(top))
    weights = (scores - top).exp()
    return weights @ v, weights.sum(-1, keepdim=True), top
