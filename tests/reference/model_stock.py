"""The ratio from the mean cosine or angle over all pairs, in float64, row by row if asked."""

from itertools import combinations

import torch

CASES = [
    {},
    {"average": "angle"},
    {"clamp_t": True},
    {"filter_wise": True},
    {"filter_wise": True, "average": "angle", "clamp_t": True},
]


def reference(base, models, *, filter_wise=False, average="cosine", clamp_t=False):
    if not filter_wise or base.ndim <= 1:
        return one(base, models, average, clamp_t)
    rows = [tensor.reshape(-1, base.shape[-1]) for tensor in (base, *models)]
    merged = [one(row, others, average, clamp_t) for row, *others in zip(*rows, strict=True)]
    return torch.stack(merged).view(base.shape)


def one(base, models, average, clamp_t):
    t = ratio([(model - base).flatten() for model in models], average, clamp_t)
    return t * sum(models) / len(models) + (1 - t) * base


def ratio(changes, average, clamp_t):
    found = []
    for a, b in combinations(changes, 2):
        lengths = a.norm() * b.norm()
        found.append((a @ b / lengths).clamp(-1, 1) if lengths else torch.tensor(0.0).double())
    found = torch.stack(found)
    mean = torch.cos(torch.arccos(found).mean()) if average == "angle" else found.mean()
    under = 1 + (len(changes) - 1) * mean
    t = len(changes) * mean / under if abs(under) >= 1e-6 else torch.zeros_like(mean)
    return t.clamp(0, 1) if clamp_t else t
