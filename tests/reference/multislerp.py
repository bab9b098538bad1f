"""The published steps in float64: unit vectors, their mean, its tangent space, and back."""

import torch

CASES = [
    {"weight": [1.0, 1.0, 1.0]},
    {"weight": [0.5, 0.2, 0.4]},
    {"weight": [0.5, 0.2, 0.4], "normalize_weights": False},
    {"weight": [1.0, -0.5, 0.2], "eps": 1e-6},
]
ENDPOINTS = [({"weight": [1.0, 0.0, 0.0]}, 0), ({"weight": [0.0, 0.0, 1.0]}, 2)]


def reference(base, models, *, weight, normalize_weights=True, eps=1e-8):
    start = torch.zeros_like(models[0]) if base is None else base
    weights = torch.tensor(weight, dtype=torch.float64)
    if normalize_weights:
        weights = weights / weights.sum()
    flat = torch.stack([(model - start).flatten() for model in models])
    norms = flat.norm(dim=1)
    unit = flat / (norms + eps)[:, None]
    mean = (weights[:, None] * unit).sum(0)
    if mean.norm() < 1e-5:
        return start + (weights[:, None] * flat).sum(0).view(start.shape)
    mean = mean / mean.norm()
    tangent = (weights[:, None] * (unit - (unit @ mean)[:, None] * mean)).sum(0)
    length = tangent.norm() + eps
    point = torch.cos(length) * mean + torch.sin(length) * tangent / length
    return start + (weights @ norms * point).view(start.shape)
