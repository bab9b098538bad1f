"""TSV-M in float64, by SVDs of every task vector and of the vectors side by side."""

import torch

from reference.spectral import merged, polar, svd

CASES = [
    {},
    {"weight": [0.5, 0.3, 0.4], "lambda": 1.5},
    {"weight": [1.0, -0.5, 0.2], "others": "sum"},
]


def reference(base, models, **params):
    return merged(base, models, combined, **params)


def combined(deltas):
    most = min(deltas[0].shape) // len(deltas)
    if most == 0:
        return sum(deltas) / len(deltas)
    parts = [svd(delta, most=most) for delta in deltas]
    u = polar(torch.cat([u for u, _, _ in parts], dim=1))
    s = torch.cat([s for _, s, _ in parts])
    v = polar(torch.cat([vh.T for _, _, vh in parts], dim=1))
    return u @ torch.diag(s) @ v.T
