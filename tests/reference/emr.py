"""EMR-Merging (arXiv 2405.17461, section 3.2) in float64, over whole models."""

import torch


def unified(vectors):
    """The elected sign (a sum of zero elects minus) times the largest magnitude that has it."""
    stacked = torch.stack(vectors)
    sign = torch.where(stacked.sum(0) > 0, 1.0, -1.0).double()
    agreeing = torch.where(stacked * sign > 0, stacked.abs(), torch.zeros_like(stacked))
    return sign * agreeing.max(0).values


def masks(vectors):
    return [(v * unified(vectors) > 0) for v in vectors]


def reference_model(base, models, *, rescaler="elements", **_):
    """Every task's model."""
    deltas = [{n: model[n] - base[n] for n in base} for model in models]
    shared = {n: unified([d[n] for d in deltas]) for n in base}
    found = {n: masks([d[n] for d in deltas]) for n in base}
    size = torch.mean if rescaler == "tensors" else torch.sum
    restored = []
    for task, delta in enumerate(deltas):
        own = sum(size(delta[n].abs()) for n in base if delta[n].numel())
        kept = sum(size((found[n][task] * shared[n]).abs()) for n in base if delta[n].numel())
        factor = own / kept if kept else 1.0
        restored.append({n: base[n] + factor * found[n][task] * shared[n] for n in base})
    return restored
