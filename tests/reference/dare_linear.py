"""Drop at random, rescale, add up ("Language models are super Mario", section 3)."""

import torch

from reference.vectors import added_up, deltas, layer_factor, per_model, rescaled

CASES = [
    {"weight": [1.0, 0.5, 0.3], "density": [0.5, 0.3, 1.0]},
    {"weight": [1.0, -0.5, 0.3], "density": 0.4, "rescale": False, "lambda": 0.6},
    {"weight": [1.0, 0.5, 0.3], "density": 0.2, "rescale": "inverse", "normalize": True},
    {"weight": 1.0, "density": [0.7, 0.0, 0.5], "lines_alpha": 0.3, "lines_beta": 0.6},
]
ENDPOINTS = [({"weight": [0.0, 1.0, 0.0]}, 1), ({"weight": 1.0, "density": 0.0}, "base")]
ORDERED = "masks are drawn by a model's place"


def dropped(vectors, density, bits, rescale):
    """Keep an element where its 32 bits are below density * 2^32."""
    after = []
    for n, (v, share) in enumerate(zip(vectors, density, strict=True)):
        below = round(share * 2**32)
        after.append(torch.where(bits(n, below >> 24) < below, v, torch.zeros_like(v)))
    how = {True: "l1", False: "none"}.get(rescale, rescale)
    return rescaled(vectors, after, how, density)


def reference(base, models, *, bits, place, weight, density=1.0, **params):
    vectors = deltas(base, models)
    rescale = params.get("rescale", "l1")
    vectors = dropped(vectors, per_model(density, models), bits, rescale)
    merged = added_up(vectors, per_model(weight, models), params.get("normalize", False))
    factor = layer_factor(place, params.get("lines_alpha"), params.get("lines_beta"))
    return base + params.get("lambda", 1.0) * factor * merged
