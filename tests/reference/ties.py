"""Trim, elect, merge ("TIES-Merging", algorithm 1), and its variants of other authors."""

import numpy as np
import torch

from reference.vectors import agreed, largest, over_model, per_model, rescaled, trimmed

CASES = [
    {"weight": 1.0},
    {"weight": [1.0, 0.5, 0.3], "density": [0.5, 0.3, 1.0]},
    {"weight": [1.0, -0.5, 0.3], "density": 0.4, "lambda": 0.6, "normalize": False},
    {"weight": [1.0, 0.5, 0.3], "density": 0.2, "rescale": True, "lines_alpha": 0.3},
    {"weight": [1.0, 0.5, 0.7], "density": 0.3, "elect": "raw", "divide": "count"},
    {"weight": [1.0, -1.0, 0.7], "density": [0.5, 0.0, 0.01], "rescale": "inverse"},
    {"weight": 1.0, "density": [0.2, 0.4, 1.0], "scope": "model"},
    {"weight": 0.5, "density": 0.2, "scope": "model", "lines_beta": 1.2},
]
ENDPOINTS = [({"weight": [0.0, 1.0, 0.0]}, 1), ({"weight": 1.0, "density": 0.0}, "base")]


def kept(delta, share):
    return trimmed(delta, max(1, int(share * delta.numel())) if share > 0 else 0)


def kept_of_all(vectors, share):
    """Trim a vector that runs through all tensors."""
    flat = np.concatenate([v.abs().reshape(-1) for v in vectors.values()])
    mask = torch.from_numpy(largest(flat, max(1, int(share * flat.size))))
    pieces = mask.split([v.numel() for v in vectors.values()])
    return {
        name: v * piece.view(v.shape)
        for (name, v), piece in zip(vectors.items(), pieces, strict=True)
    }


def reference_model(base, models, *, places, weight, density=1.0, **params):
    density = per_model(density, models)
    names = list(base)
    before = [{n: model[n] - base[n] for n in names} for model in models]
    if params.pop("scope", "tensor") == "model":
        after = [kept_of_all(v, share) for v, share in zip(before, density, strict=True)]
    else:
        after = [
            {n: kept(v[n], share) for n in names} for v, share in zip(before, density, strict=True)
        ]
    how = {True: "l1", False: "none"}.get(params.get("rescale"), params.get("rescale"))
    params.pop("rescale", None)
    lines = {k: params.pop(k) for k in ("lines_alpha", "lines_beta") if k in params}
    scale = params.pop("lambda", 1.0)
    normalize = params.pop("normalize", True)

    def merged(name):
        vectors = rescaled([v[name] for v in before], [v[name] for v in after], how, density)
        return agreed(vectors, per_model(weight, models), normalize, **params)

    return over_model(merged, base, models, places, lambda_=scale, **lines)
