"""Iso-C in float64, by a full SVD of every matrix."""

import torch

CASES = [
    {},
    {"weight": [0.5, 0.3, 0.4], "lambda": 1.5},
    {"weight": [1.0, -0.5, 0.2], "others": "sum"},
    {"others": "base"},
]
SLACK = 16.0  # of the inputs' float64 rounding: the squares of singular values lose half the digits


def reference(base, models, *, place=None, weight=1.0, lambda_=1.0, others="mean", **rest):
    lambda_ = rest.get("lambda", lambda_)
    weight = weight if isinstance(weight, list) else [weight] * len(models)
    deltas = [w * (model - base) for w, model in zip(weight, models, strict=True)]
    if base.ndim < 2:
        share = {"mean": 1 / len(models), "sum": 1.0, "base": 0.0}[others]
        return base + lambda_ * share * sum(deltas)
    return base + lambda_ * flattened(sum(deltas))


def flattened(delta):
    if delta.ndim == 3:
        return torch.stack([flattened(one) for one in delta])
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    kept = s > 1e-5 * s[0]
    return s[kept].mean() * u[:, kept] @ vh[kept]
