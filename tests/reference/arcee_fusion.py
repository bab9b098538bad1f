"""Importance, quartiles and mask in float64, with a full sort."""

import torch

CASES = [{}]


def reference(base, models):
    (other,) = models
    before, after = base.softmax(-1) + 1e-8, other.softmax(-1) + 1e-8
    divergence = (after * (after / before).log()).sum(-1, keepdim=True)
    importance = (other - base).abs() * divergence
    ordered = importance.flatten().sort().values
    first, middle, third = (ordered[n * (len(ordered) - 1) // 4] for n in (1, 2, 3))
    return torch.where(importance >= middle + 1.5 * (third - first), other, base)
