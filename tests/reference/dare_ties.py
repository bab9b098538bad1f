"""Drop at random, rescale, elect signs ("Language models are super Mario", with TIES)."""

from reference.dare_linear import ENDPOINTS, ORDERED, dropped
from reference.vectors import agreed, deltas, layer_factor, per_model

CASES = [
    {"weight": [1.0, 0.5, 0.3], "density": [0.5, 0.3, 1.0]},
    {"weight": [1.0, -0.5, 0.3], "density": 0.4, "rescale": False, "lambda": 0.6},
    {"weight": [1.0, 0.5, 0.3], "density": 0.2, "rescale": "inverse", "normalize": True},
    {"weight": [1.0, 0.5, 0.3], "density": 0.6, "elect": "raw", "lines_alpha": 0.3},
]
__all__ = ["CASES", "ENDPOINTS", "ORDERED", "reference"]


def reference(base, models, *, bits, place, weight, density=1.0, **params):
    vectors = deltas(base, models)
    rescale = params.get("rescale", "l1")
    vectors = dropped(vectors, per_model(density, models), bits, rescale)
    normalize, elect = params.get("normalize", False), params.get("elect", "weighted")
    merged = agreed(vectors, per_model(weight, models), normalize, elect)
    factor = layer_factor(place, params.get("lines_alpha"), params.get("lines_beta"))
    return base + params.get("lambda", 1.0) * factor * merged
