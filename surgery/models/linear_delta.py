"""The gated delta rule, a chunk of tokens at a time.

Axis letters: b rows, h KV heads, r query heads a KV head, n chunks, c and j tokens of a chunk,
k feature width, v value width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .linear_core import State

FORMAT = 1  # of what checkpoints hold; a change that old ones do not follow counts it up


class _Chunks(NamedTuple):
    """Inputs cut into chunks, [b, h, r, n, c, .]; documents are [b, 1, 1, n, c]."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    beta: Tensor
    docs: Tensor
    before: Tensor  # document of the state that a chunk begins with, [b, 1, 1, n, 1]
    after: Tensor


class _Solved(NamedTuple):
    """What chunks are to the scan over states.

    Attributes:
        written: [b, h, r, n, c, v], what each token writes if the state is empty.
        read: [b, h, r, n, c, k], what of the state is taken from that.
        q: queries as they read the state.
        k: keys as they write to the state after the chunk.
        scores: [b, h, r, n, c, j], queries against what is written.
        kept: [b, h, r, n, 1, 1], what of the state is left after the chunk.
    """

    written: Tensor
    read: Tensor
    q: Tensor
    k: Tensor
    scores: Tensor
    kept: Tensor


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    *,
    state: State | None = None,
    docs: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, State]:
    """Return the outputs [b, h, r, t, v] and the state after the last token.

    S_i = exp(gate_i) S_{i-1}; S_i += beta_i k_i (v_i - S_i^T k_i)^T; out_i = S_i^T q_i. Computed in
    float32, or float64 for float64 inputs; time and memory are linear in t. Decays are exponentials
    of sums of gates, never of differences of sums: they are at most 1 and exact after strong ones.

    Args:
        q: [b, h, r, t, k].
        k, v: [b, h, r or 1, t, k or v]; a state is shared by r queries where all of k, v, gate and
            beta have 1.
        gate: [b, h, r or 1, t, 1], log decays, at most 0, -inf included.
        beta: [b, h, r or 1, t, 1], how much of what the key finds is replaced.
        state: of earlier tokens.
        docs: int64 [b, t], contiguous and rising, -1 for padding; None: one document.
        chunk: tokens that are solved for together.

    Source: Yang et al., Gated Delta Networks, arXiv 2412.06464, equation 10 and section 3.3 (WY and
    UT forms).
    """
    b, t = q.shape[0], q.shape[3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if docs is None:
        docs = torch.zeros(b, t, dtype=torch.int64, device=q.device)
    held = state.doc if state is not None else docs.new_full((b,), -1)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, gate, beta = (x.to(dtype) for x in (q, k, v, gate, beta))
        chunks = _cut(q, k, v, gate, beta, docs, held, max(1, min(chunk, t)))
        sums = _sums(state, chunks)
        out, sums = _scan(_solve(chunks), sums)
        return out.flatten(3, 4)[:, :, :, :t], State(sums, chunks.after[:, 0, 0, -1, 0].clone())


def _cut(  # noqa: PLR0917
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    docs: Tensor,
    held: Tensor,
    chunk: int,
) -> _Chunks:
    """Chunks of equal length; padding neither decays, writes nor reads."""
    short = -docs.shape[1] % chunk
    docs = pad(docs, (0, short), value=-1)
    own = docs.view(len(docs), -1, chunk)
    last = own.amax(2)
    seen = torch.cat((held[:, None], last), 1).cummax(1).values[:, None, None, :, None]
    gone = (docs < 0)[:, None, None, :, None]
    q, k, v, gate, beta = (pad(x, (0, 0, 0, short)) for x in (q, k, v, gate, beta))
    gate, beta = gate.masked_fill(gone, 0), beta.masked_fill(gone, 0)
    # What lies in padding may be infinite, and no zero would mend that.
    q, k, v = (x.masked_fill(gone, 0) for x in (q, k, v))
    q, k, v, gate, beta = (_parts(x, chunk) for x in (q, k, v, gate, beta))
    return _Chunks(q, k, v, gate, beta, own[:, None, None], seen[:, :, :, :-1], seen[:, :, :, 1:])


def _parts(x: Tensor, chunk: int) -> Tensor:
    return x.view(*x.shape[:3], -1, chunk, x.shape[-1])


def _sums(state: State | None, chunks: _Chunks) -> Tensor:
    """The state to begin with, [b, h, r or 1, k, v]."""
    if state is not None:
        return state.sums.to(chunks.q.dtype)
    b, h = chunks.q.shape[:2]
    r = max(x.shape[2] for x in (chunks.k, chunks.v, chunks.gate, chunks.beta))
    return chunks.q.new_zeros(b, h, r, chunks.k.shape[-1], chunks.v.shape[-1])


def _solve(chunks: _Chunks) -> _Solved:
    """Everything that does not need the states, for all chunks at once.

    Tokens of a chunk write U = (I + L)^-1 beta (V - decayed K S), L_ij = beta_i decay_ij k_i k_j
    below the diagonal.
    """
    q, k, v, gate, beta, docs, before, after = chunks
    decay = _between(gate, docs)
    from_start = gate.cumsum(4).exp() * (docs == before)[..., None]
    to_end = _to_end(gate) * (docs == after)[..., None]
    lower = (beta * (k @ k.mT) * decay).tril(-1)
    r = max(x.shape[2] for x in (k, v, gate, beta))
    both = torch.cat([_shared(beta * v, r), _shared(beta * from_start * k, r)], -1)
    lower = _shared(lower, r)
    solved = torch.linalg.solve_triangular(lower, both, upper=False, unitriangular=True)
    written, read = torch.split(solved, [v.shape[-1], k.shape[-1]], -1)
    kept = gate.sum(4, keepdim=True).exp() * (before == after)[..., None]
    return _Solved(written, read, q * from_start, k * to_end, (q @ k.mT) * decay, kept)


def _shared(x: Tensor, r: int) -> Tensor:
    return x.expand(-1, -1, r, *x.shape[3:])


def _between(gate: Tensor, docs: Tensor) -> Tensor:
    """Decay from after token j to token i, [.., c, j]; 0 above the diagonal and across borders."""
    c = gate.shape[-2]
    ones = torch.ones(c, c, dtype=torch.bool, device=gate.device)
    sums = gate.expand(*gate.shape[:-1], c).masked_fill(~ones.tril(-1), 0).cumsum(-2)
    same = (docs[..., :, None] == docs[..., None, :]) & ones.tril()
    return sums.masked_fill(~same, -torch.inf).exp()


def _to_end(gate: Tensor) -> Tensor:
    """Decay from after each token to the end of its chunk."""
    after = pad(gate[..., 1:, :], (0, 0, 0, 1))
    return after.flip(-2).cumsum(-2).flip(-2).exp()


def _scan(solved: _Solved, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [b, h, r, n, c, v], and the state after the last chunk."""
    outs = []
    for written, read, q, k, scores, kept in zip(*(x.unbind(3) for x in solved), strict=True):
        new = written - read @ sums
        outs.append(q @ sums + scores @ new)
        sums = kept * sums + k.mT @ new
    return torch.stack(outs, 3), sums
