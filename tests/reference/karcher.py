"""The fixed point on the sphere in float64, on the vectors themselves."""

import torch

CASES = [
    {},
    {"weight": [0.5, 0.2, 0.4]},
    {"weight": [1.0, 0.0, 1.0], "max_iter": 3, "tol": 1e-9},
    {"max_iter": 1},
]
ENDPOINTS = [({"weight": [1.0, 0.0, 0.0]}, 0), ({"weight": [0.0, 0.0, 1.0]}, 2)]


def reference(base, models, *, weight=(1.0, 1.0, 1.0), max_iter=10, tol=1e-5):
    flat = [model.flatten() for model in models]
    scale = sum(w * v.norm() for w, v in zip(weight, flat, strict=True)) / sum(weight)
    kept = [(w, v / v.norm()) for w, v in zip(weight, flat, strict=True) if w and v.norm()]
    if not kept:
        return torch.zeros_like(models[0])
    pulls = [w / sum(w for w, _ in kept) for w, _ in kept]
    units = [u for _, u in kept]
    mean = sum(a * u for a, u in zip(pulls, units, strict=True))
    mean = units[0] if mean.norm() < tol else mean / mean.norm()
    for _ in range(max_iter):
        tangent = torch.zeros_like(mean)
        for a, u in zip(pulls, units, strict=True):
            straight = u - (u @ mean) * mean
            angle = torch.atan2(straight.norm(), u @ mean)
            opposed = torch.pi - angle < 1e-4
            if angle >= tol and not opposed:
                tangent = tangent + a * angle * straight / straight.norm()
        if tangent.norm() < tol:
            break
        mean = (
            torch.cos(tangent.norm()) * mean + torch.sin(tangent.norm()) * tangent / tangent.norm()
        )
        mean = mean / mean.norm()
    return (scale * mean).view(models[0].shape)
