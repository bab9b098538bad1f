"""Spherical interpolation of whole tensors, rows or columns in float64, vector by vector."""

import torch

CASES = [
    {"weight": [1.0, 1.0]},
    {"weight": [0.3, 0.9]},
    {"weight": [1.0, -1.0]},
    {"weight": [0.3, 0.9], "nuslerp_flatten": False},
    {"weight": [0.3, 0.9], "nuslerp_flatten": False, "nuslerp_row_wise": True},
]
ENDPOINTS = [({"weight": [1.0, 0.0]}, 0), ({"weight": [0.0, 2.0]}, 1)]


def reference(base, models, *, weight, nuslerp_flatten=True, nuslerp_row_wise=False):
    t = weight[1] / sum(weight) if abs(sum(weight)) > 1e-6 else 0.5
    a, b = (model if base is None else model - base for model in models)
    merged = between(a, b, t, nuslerp_flatten, nuslerp_row_wise)
    return merged if base is None else base + merged


def between(a, b, t, flatten, row_wise):
    if flatten or a.ndim <= 1:
        return one(a.flatten(), b.flatten(), t).view(a.shape)
    if row_wise:
        a, b = a.movedim(0, -1), b.movedim(0, -1)
    rows = zip(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), strict=True)
    merged = torch.stack([one(u, v, t) for u, v in rows]).view(a.shape)
    return merged.movedim(-1, 0) if row_wise else merged


def one(a, b, t):
    if not a.norm() or not b.norm():
        angle = torch.tensor(torch.pi / 2, dtype=torch.float64)
    else:
        angle = torch.arccos(((a / a.norm()) @ (b / b.norm())).clamp(-1, 1))
    if torch.sin(angle) < 1e-4:
        return (1 - t) * a + t * b
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
