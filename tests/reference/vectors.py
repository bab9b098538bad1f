"""The stages of task-vector methods, naive and in float64, from the papers' formulas."""

import numpy as np
import torch


def deltas(base, models):
    return [model - base for model in models]


def largest(values, count):
    """Mask of the `count` largest of a flat array, the lower index first where equal."""
    values = np.asarray(values).reshape(-1)
    order = np.lexsort((np.arange(values.size), -values))
    mask = np.zeros(values.size, bool)
    mask[order[:count]] = True
    return mask


def trimmed(delta, count):
    mask = torch.from_numpy(largest(delta.abs(), count)).view(delta.shape)
    return torch.where(mask, delta, torch.zeros_like(delta))


def rescaled(before, after, how, density):
    """Per model: keep the sum of magnitudes, or divide by the density."""
    found = []
    for whole, kept, share in zip(before, after, density, strict=True):
        factor = 1.0
        if share < 1 and how == "l1" and kept.abs().sum() > 0:
            factor = whole.abs().sum() / kept.abs().sum()
        if 0 < share < 1 and how == "inverse":
            factor = 1 / share
        found.append(kept * factor)
    return found


def added_up(vectors, weight, normalize):
    total = sum(w * v for w, v in zip(weight, vectors, strict=True))
    return total / sum(weight) if normalize else total


def agreed(vectors, weight, normalize, elect="weighted", divide="weights"):
    """Elect signs; a vote within 2^-19 of a draw is one, and elects plus."""
    terms = torch.stack([w * v for w, v in zip(weight, vectors, strict=True)])
    votes = terms if elect == "weighted" else torch.stack(vectors)
    plus = votes.sum(0) >= -(2.0**-19) * votes.abs().sum(0)
    agrees = torch.where(plus, votes > 0, votes < 0)
    result = (terms * agrees).sum(0)
    if not normalize:
        return result
    counted = [1.0] * len(vectors) if divide == "count" else weight
    ones = torch.tensor(counted, dtype=torch.float64)
    shape = (-1,) + (1,) * (votes.dim() - 1)
    divisor = (agrees * ones.view(shape)).sum(0)
    return result / torch.where(divisor.abs() < 1e-8, torch.ones_like(divisor), divisor)


def per_model(value, models):
    return list(value) if isinstance(value, list) else [value] * len(models)


def layer_factor(place, alpha, beta):
    """LiNeS: alpha + beta * depth; alpha alone goes up to 1, outside the layers alpha."""
    if alpha is None:
        return 1.0
    slope = 1 - alpha if beta is None else beta
    return alpha + slope * (place.depth if place.depth is not None else 0.0)


def over_model(merged, base, models, places, *, lines_alpha=None, lines_beta=None, lambda_=1.0):
    """Add merged vectors to the base; with beta alone, alpha is |sum of deltas| / |merged| / T.

    `merged` tells a tensor's merged vector by name.
    """
    vectors = {name: merged(name) for name in base}
    if lines_alpha is None and lines_beta is not None:
        plain = sum(sum(m[n] - base[n] for m in models).abs().sum() for n in base)
        lines_alpha = float(plain / sum(v.abs().sum() for v in vectors.values())) / len(models)
    return {
        name: base[name] + lambda_ * layer_factor(places[name], lines_alpha, lines_beta) * vector
        for name, vector in vectors.items()
    }
