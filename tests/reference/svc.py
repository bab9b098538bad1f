"""Singular value calibration in float64, direction by direction."""

import torch

from reference.spectral import merged, svd

CASES = [
    {},
    {"weight": [0.5, 0.3, 0.4], "lambda": 1.5, "alpha": 1.0},
    {"weight": [1.0, -0.5, 0.0], "others": "base"},
    {"factor": "code", "alpha": 0.5},
    {"factor": "code", "weight": 0.3, "others": "mean"},
]


def reference(base, models, *, others="sum", **params):
    return merged(base, models, calibrated, others=others, **params)


def calibrated(deltas, alpha=0.1, factor="paper"):
    whole = sum(deltas)
    u, s, vh = svd(whole)
    gamma = torch.ones_like(s)
    for r in range(len(s)):
        counts = [count(u[:, r] @ whole, u[:, r] @ delta, delta.norm()) for delta in deltas]
        if factor == "paper":
            gamma[r] = len(deltas) / sum(max(alpha, c) for c in counts)
        elif min(counts) > 0:
            gamma[r] = 1 / max(alpha, sum(counts) / len(counts))
    return u @ torch.diag(gamma * s) @ vh


def count(whole, own, norm):
    return float(whole @ own / (own @ own)) if own.norm() > 1e-5 * norm else 0.0
