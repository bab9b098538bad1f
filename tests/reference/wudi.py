"""WUDI in float64: the pseudo-inverse of the stacked task vectors, or torch's own Adam."""

import torch

from reference.spectral import merged

CASES = [
    {},
    {"weight": [0.5, 0.3, 0.4], "lambda": 1.5},
    {"weight": [1.0, -0.5, 0.0], "others": "base"},
    {"solver": "adam", "steps": 20, "rate": 1e-3},
]


def reference(base, models, **params):
    return merged(base, models, solved, **params)


def objective(t, deltas):
    squares = [delta.square().sum() for delta in deltas]
    return sum(
        ((t - delta) @ delta.T).square().sum() / square
        for delta, square in zip(deltas, squares, strict=True)
        if square > 0
    )


def solved(deltas, solver="closed", steps=300, rate=1e-5):
    if solver == "adam":
        return stepwise(deltas, steps, rate)
    parts = [delta / (delta.norm() or 1.0) for delta in deltas]
    wanted = sum(delta @ part.T @ part for delta, part in zip(deltas, parts, strict=True))
    _, s, vh = torch.linalg.svd(torch.cat(parts), full_matrices=False)
    vh, s = vh[s > 1e-5 * s[0]], s[s > 1e-5 * s[0]]
    return wanted @ vh.T @ torch.diag(s**-2) @ vh


def stepwise(deltas, steps, rate):
    t = sum(deltas).clone().requires_grad_(True)
    adam = torch.optim.Adam([t], lr=rate)
    for _ in range(steps):
        adam.zero_grad()
        objective(t, deltas).backward()
        adam.step()
    return t.detach()
