"""The mean over the models that changed a weight, in float64."""

import torch

CASES = [{}, {"epsilon": 0.02}, {"epsilon": 0.0}]


def reference(base, models, *, epsilon=1e-5):
    changes = torch.stack([model - base for model in models])
    changed = changes.abs() > epsilon
    return base + (changes * changed).sum(0) / changed.sum(0).clamp_min(1)
