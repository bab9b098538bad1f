"""Spherical interpolation in float64."""

import torch

CASES = [{"t": 0.3}, {"t": 0.5}, {"t": 0.9}]
ENDPOINTS = [({"t": 0.0}, "base"), ({"t": 1.0}, 0)]
ORDERED = True


def reference(base, models, *, t):
    (other,) = models
    a, b = base.flatten(), other.flatten()
    cosine = unit(a) @ unit(b)
    if abs(cosine) > 0.9995:
        return (1 - t) * base + t * other
    angle = torch.arccos(cosine)
    return (torch.sin((1 - t) * angle) * base + torch.sin(t * angle) * other) / torch.sin(angle)


def unit(vector):
    """A vector shorter than 1e-8 is left as it is."""
    return vector / vector.norm() if vector.norm() > 1e-8 else vector
