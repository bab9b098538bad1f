"""Drop the largest and the smallest magnitudes ("Model Breadcrumbs", section 3), and add up."""

import torch

from reference.vectors import added_up, deltas, layer_factor, per_model, rescaled, trimmed

CASES = [
    {"weight": [1.0, 0.5, 0.3], "density": [0.5, 0.3, 1.0]},
    {"weight": [1.0, -0.5, 0.3], "density": 0.4, "gamma": [0.1, 0.0, 0.7], "lambda": 0.6},
    {"weight": [1.0, 0.5, 0.3], "density": 0.4, "gamma": 0.3, "rescale": True},
    {"weight": 1.0, "density": 0.7, "gamma": 0.2, "scope": "row", "lines_alpha": 0.3},
    {"weight": 1.0, "density": 0.2, "gamma": 0.1, "scope": "row", "normalize": True},
]
ENDPOINTS = [({"weight": [0.0, 1.0, 0.0]}, 1), ({"weight": 1.0, "density": 0.0}, "base")]


def without(delta, density, gamma):
    kept = int(density * delta.numel())
    top = min(int(gamma * delta.numel()), delta.numel() - kept)
    return trimmed(delta, top + kept) - trimmed(delta, top)


def sparse(vectors, density, gamma, scope, rescale):
    after = []
    for vector, share, outliers in zip(vectors, density, gamma, strict=True):
        rows = list(vector) if scope == "row" and vector.dim() > 1 else [vector]
        cut = [without(row, share, outliers) for row in rows]
        after.append(torch.stack(cut).view(vector.shape))
    how = {True: "l1", False: "none"}.get(rescale, rescale)
    return rescaled(vectors, after, how, density)


def reference(base, models, *, place, weight, density=1.0, gamma=0.01, **params):
    density, gamma = per_model(density, models), per_model(gamma, models)
    scope, rescale = params.get("scope", "tensor"), params.get("rescale", "none")
    vectors = sparse(deltas(base, models), density, gamma, scope, rescale)
    merged = added_up(vectors, per_model(weight, models), params.get("normalize", False))
    factor = layer_factor(place, params.get("lines_alpha"), params.get("lines_beta"))
    return base + params.get("lambda", 1.0) * factor * merged
