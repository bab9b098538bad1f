"""Iso-C in float64, by a full SVD of every matrix."""

from reference.spectral import merged, svd

CASES = [
    {},
    {"weight": [0.5, 0.3, 0.4], "lambda": 1.5},
    {"weight": [1.0, -0.5, 0.2], "others": "sum"},
    {"others": "base", "lines_alpha": 0.4},
    {"lines_alpha": 0.4, "lines_beta": 0.3},
]


def reference(base, models, **params):
    return merged(base, models, flattened, **params)


def flattened(deltas):
    u, s, vh = svd(sum(deltas))
    return s.mean() * u @ vh
