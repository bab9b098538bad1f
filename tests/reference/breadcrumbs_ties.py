"""Drop the largest and the smallest magnitudes, and elect signs ("Model Breadcrumbs", TIES)."""

from reference.breadcrumbs import ENDPOINTS, sparse
from reference.vectors import agreed, deltas, layer_factor, per_model

CASES = [
    {"weight": [1.0, 0.5, 0.3], "density": [0.5, 0.3, 1.0]},
    {"weight": [1.0, -0.5, 0.3], "density": 0.4, "gamma": [0.1, 0.0, 0.7], "lambda": 0.6},
    {"weight": [1.0, 0.5, 0.3], "density": 0.4, "gamma": 0.3, "normalize": True},
    {"weight": 1.0, "density": 0.7, "gamma": 0.2, "scope": "row", "lines_alpha": 0.3},
]
__all__ = ["CASES", "ENDPOINTS", "reference"]


def reference(base, models, *, place, weight, density=1.0, gamma=0.01, **params):
    density, gamma = per_model(density, models), per_model(gamma, models)
    scope, rescale = params.get("scope", "tensor"), params.get("rescale", "none")
    vectors = sparse(deltas(base, models), density, gamma, scope, rescale)
    merged = agreed(vectors, per_model(weight, models), params.get("normalize", False))
    factor = layer_factor(place, params.get("lines_alpha"), params.get("lines_beta"))
    return base + params.get("lambda", 1.0) * factor * merged
