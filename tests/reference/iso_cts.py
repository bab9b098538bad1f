"""Iso-CTS in float64, by full SVDs, projections formed as matrices."""

import torch

from reference.spectral import merged, polar, svd

CASES = [
    {},
    {"weight": [0.5, 0.3, 0.4], "lambda": 1.5, "common": 0.5},
    {"weight": [1.0, -0.5, 0.2], "common": 0.3, "others": "sum"},
    {"common": 1.0},
    {"common": 0.0},
]


SLACK = 8.0  # X^T X is taken off where most of it is common: squares have half the digits


def reference(base, models, **params):
    return merged(base, models, combined, **params)


def combined(deltas, common=0.8):
    size, count = min(deltas[0].shape), len(deltas)
    own = min(round((size - int(size * common)) / count), size // count)
    u, s, vh = svd(sum(deltas), most=size - own * count)
    parts = []
    for delta in deltas:
        rest = delta - u @ (u.T @ delta)
        parts.append(svd(rest, most=own, largest=float(torch.linalg.matrix_norm(delta, 2))))
    parts.append((u, s, vh))
    left = polar(torch.cat([u for u, _, _ in parts], dim=1))
    mean = torch.cat([s for _, s, _ in parts]).mean()
    right = polar(torch.cat([vh.T for _, _, vh in parts], dim=1))
    return mean * left @ right.T
