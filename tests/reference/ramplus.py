"""Shared changes averaged, unique ones times a factor from the overlap of whole models; float64."""

import torch

CASES = [{}, {"epsilon": 0.02}, {"epsilon": 0.03, "r": 2.0, "alpha": 0.5}]


def reference_model(base, models, *, places, epsilon=1e-5, r=0.1, alpha=0.2):
    changed = {n: changes(base[n], [m[n] for m in models], epsilon) for n in base}
    counts = [ours(found) for found in changed.values()]
    shared, unique = (sum(one) for one in zip(*counts, strict=True))
    return {n: base[n] + merged(found, shared, unique, r, alpha) for n, found in changed.items()}


def changes(base, models, epsilon):
    every = torch.stack([model - base for model in models])
    return torch.where(every.abs() > epsilon, every, 0.0)


def ours(found):
    """How many changes of each model are shared, and how many are its own."""
    flat = found.reshape(len(found), -1)
    count = (flat != 0).sum(0)
    return ((flat != 0) & (count > 1)).sum(1), ((flat != 0) & (count == 1)).sum(1)


def merged(found, shared, unique, r, alpha):
    count = (found != 0).sum(0)
    result = torch.zeros_like(found[0])
    for model, change in enumerate(found):
        rho = min(float(shared[model]) / max(float(unique[model]), 1.0), alpha)
        own = (1 + r * rho) * change
        result = result + torch.where(count == 1, own, change / count.clamp_min(1))
    return result
