"""WUDI in float64: the pseudo-inverse of the stacked task vectors, or torch's own Adam."""

import torch

from reference.spectral import merged

CASES = [
    {},
    {"weight": [0.5, 0.3, 0.4], "lambda": 1.5, "ridge": 0.0},
    {"weight": [1.0, -0.5, 0.0], "others": "base", "ridge": 0.01},
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


def solved(deltas, solver="closed", ridge=1.0, steps=300, rate=1e-5):
    if solver == "adam":
        return stepwise(deltas, steps, rate)
    if ridge:
        return ridged(deltas, ridge)
    parts = [delta / (delta.norm() or 1.0) for delta in deltas]
    wanted = sum(delta @ part.T @ part for delta, part in zip(deltas, parts, strict=True))
    _, s, vh = torch.linalg.svd(torch.cat(parts), full_matrices=False)
    vh, s = vh[s > 1e-5 * s[0]], s[s > 1e-5 * s[0]]
    return wanted @ vh.T @ torch.diag(s**-2) @ vh


def ridged(deltas, ridge):
    shares = [delta.T @ delta / (delta.square().sum() or 1.0) for delta in deltas]
    stay = ridge * torch.linalg.eigvalsh(sum(shares)).mean()
    wanted = sum(delta @ share for delta, share in zip(deltas, shares, strict=True))
    whole = sum(shares) + stay * torch.eye(deltas[0].shape[1], dtype=torch.float64)
    return torch.linalg.solve(whole, wanted + stay * sum(deltas), left=False)


def stepwise(deltas, steps, rate):
    t = sum(deltas).clone().requires_grad_(True)
    adam = torch.optim.Adam([t], lr=rate)
    for _ in range(steps):
        adam.zero_grad()
        objective(t, deltas).backward()
        adam.step()
    return t.detach()
