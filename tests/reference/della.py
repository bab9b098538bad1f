"""Drop small elements more often, elect signs, average what agrees ("DELLA-Merging")."""

from reference.della_linear import ENDPOINTS, ORDERED, magpruned
from reference.vectors import agreed, deltas, layer_factor, per_model

CASES = [
    {"weight": [1.0, 0.5, 0.3], "density": [0.5, 0.3, 1.0]},
    {"weight": [1.0, -0.5, 0.3], "density": 0.4, "rescale": False, "lambda": 0.6},
    {"weight": [1.0, 0.5, 0.3], "density": 0.4, "epsilon": 0.3, "rescale": "inverse"},
    {"weight": 1.0, "density": 0.7, "epsilon": 0.1, "normalize": False, "divide": "count"},
]
__all__ = ["CASES", "ENDPOINTS", "ORDERED", "reference"]


def reference(base, models, *, bits, place, weight, density=1.0, epsilon=0.15, **params):
    density, epsilon = per_model(density, models), per_model(epsilon, models)
    vectors = deltas(base, models)
    vectors = magpruned(vectors, density, epsilon, bits, params.get("rescale", "l1"))
    merged = agreed(vectors, per_model(weight, models), params.get("normalize", True))
    factor = layer_factor(place, params.get("lines_alpha"), params.get("lines_beta"))
    return base + params.get("lambda", 1.0) * factor * merged
