"""Small inputs of the cores, the same at every call."""

from __future__ import annotations

import torch

from surgery.models.linear_core import Anchors

B, H, R, K, V = 2, 2, 3, 5, 4
CHUNK, WINDOW, LEAD = 8, 6, 4
GATES = ("none", "scalar", "vector")
LENGTHS = (1, 5, CHUNK, 21, 3 * CHUNK)
PADDED = -1


def seeded(*sizes, dtype=torch.float32):
    made = torch.Generator().manual_seed(sum(n * 31**i for i, n in enumerate(sizes)))
    return torch.randn(*sizes, generator=made, dtype=torch.float64).to(dtype)


def linear_inputs(t, kind="vector", *, shared=True, dtype=torch.float32):
    """Queries, keys, values and gates; `shared`: one key and gate for all queries of a KV head."""
    r = 1 if shared else R
    q, k, v = seeded(B, H, R, t, K), seeded(B, H, r, t, K), seeded(B, H, r, t, V)
    gate = {"none": None, "scalar": seeded(B, H, r, t, 1), "vector": seeded(B, H, r, t, K)}[kind]
    gate = None if gate is None else -2 * gate.abs()
    return [None if x is None else x.to(dtype) for x in (q, k, v, gate)]


def window_inputs(t, lead=LEAD, dtype=torch.float32):
    return [seeded(B, H, *n, dtype=dtype) for n in ((R, t, K), (1, lead + t, K), (1, lead + t, V))]


def documents(t):
    """Four documents in the first row, the second padded on the left."""
    told = (torch.arange(t) // 6).expand(B, t).clone()
    told[1] = 0
    told[1, : min(t - 1, 4)] = PADDED
    return told


def anchors(dtype=torch.float32):
    return Anchors(
        seeded(B, H, 1, 2, K, dtype=dtype),
        seeded(B, H, 1, 2, V, dtype=dtype),
        torch.tensor([[0, 1], [0, PADDED]]),
        torch.tensor([[-3, 2], [1, 2]]),
    )


def close(found, wanted, *, tolerance=1e-5):
    scale = wanted.abs().max().clamp(min=1).item()
    torch.testing.assert_close(found.double(), wanted.double(), atol=tolerance * scale, rtol=0)


def parts(x, cuts):
    """Tokens cut into calls; documents have them second, all else fourth."""
    axis = 1 if x is not None and x.dim() == 2 else 3
    ends = zip((0, *cuts), (*cuts, None), strict=True)
    return [None if x is None else x.movedim(axis, 0)[a:b].movedim(0, axis) for a, b in ends]
