"""Dataless localize-and-stitch (arXiv 2408.13656): global masks, averaged where they overlap."""

import numpy as np
import torch

from reference.vectors import largest, over_model, per_model

CASES = [
    {},
    {"density": [0.05, 0.3, 0.6]},
    {"density": 1.0, "lambda": 0.5},
    {"density": [1e-9, 0.2, 0.01], "lines_alpha": 0.4},
    {"density": 0.2, "lines_beta": 0.7},
]
ENDPOINTS = [({"lambda": 0.0}, "base")]


def masks(vectors, share):
    """The mask of the largest magnitudes of a vector that runs through all tensors."""
    flat = np.concatenate([np.abs(v.numpy()).reshape(-1) for v in vectors.values()])
    found = torch.from_numpy(largest(flat, max(1, int(share * flat.size))) & (flat > 0))
    pieces = found.split([v.numel() for v in vectors.values()])
    return {n: p.view(v.shape) for (n, v), p in zip(vectors.items(), pieces, strict=True)}


def reference_model(base, models, *, places, density=0.1, **params):
    vectors = [{n: model[n] - base[n] for n in base} for model in models]
    found = [masks(v, d) for v, d in zip(vectors, per_model(density, models), strict=True)]

    def merged(name):
        total = sum(m[name] * v[name] for m, v in zip(found, vectors, strict=True))
        count = sum(m[name].double() for m in found)
        return total / count.clamp(min=1)

    scale = params.pop("lambda", 1.0)
    return over_model(merged, base, models, places, lambda_=scale, **params)
