"""Weighted average in float64."""

CASES = [
    {"weight": [1.0, 1.0, 1.0]},
    {"weight": [0.5, 0.3, 0.4]},
    {"weight": [1.0, -0.5, 0.2]},
    {"weight": [0.5, 0.3, 0.4], "normalize": False},
]
ENDPOINTS = [({"weight": [1.0, 0.0, 0.0]}, 0), ({"weight": [0.0, 0.0, 1.0]}, 2)]


def reference(base, models, *, weight, normalize=True):
    total = sum(w * model for w, model in zip(weight, models, strict=True))
    return total / sum(weight) if normalize else total


def returns_itself(params):
    """The weights must sum to one."""
    return params.get("normalize", True)
