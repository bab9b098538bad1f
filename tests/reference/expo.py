"""Extrapolation in float64."""

CASES = [{}, {"alpha": 0.5}, {"alpha": -0.25}]
ENDPOINTS = [({"alpha": 0.0}, 0), ({"alpha": -1.0}, "base")]


def reference(base, models, *, alpha=0.3):
    (aligned,) = models
    return (1 + alpha) * aligned - alpha * base
