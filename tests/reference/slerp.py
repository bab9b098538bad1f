"""Spherical interpolation in float64."""

import torch

CASES = [{"t": 0.3}, {"t": 0.5}, {"t": 0.9}]
ENDPOINTS = [({"t": 0.0}, "base"), ({"t": 1.0}, 0)]
ORDERED = True


def reference(base, models, *, t):
    (other,) = models
    a, b = base.flatten(), other.flatten()
    cosine = (a / a.norm()) @ (b / b.norm())
    if abs(cosine) > 0.9995:
        return (1 - t) * base + t * other
    angle = torch.arccos(cosine)
    return (torch.sin((1 - t) * angle) * base + torch.sin(t * angle) * other) / torch.sin(angle)
