"""Consensus over TALL masks (arXiv 2405.07813), weight by weight from the formula."""

from reference.vectors import deltas, over_model, per_model

CASES = [
    {},
    {"lambda": 0.0, "k": 3},
    {"lambda": [0.2, 0.6, 0.4], "k": 1, "scale": 0.5},
    {"lambda": 1.0, "k": 2, "scale": 1.0, "lines_alpha": 0.3},
    {"lambda": 0.5, "k": 0, "scale": -0.3},
    {"lambda": 0.3, "k": 2, "scale": 0.6, "lines_beta": 0.8},
]
ENDPOINTS = [({"scale": 0.0}, "base")]


def kept(vectors, bounds, k):
    total = sum(vectors)
    votes = sum(
        (v.abs() > bound * (total - v).abs()).int()
        for v, bound in zip(vectors, bounds, strict=True)
    )
    return total * (votes >= k)


def reference_model(base, models, *, places, k=2, scale=0.3, **params):
    bounds = per_model(params.pop("lambda", 0.4), models)

    def merged(name):
        return kept(deltas(base[name], [m[name] for m in models]), bounds, k)

    return over_model(merged, base, models, places, lambda_=scale, **params)
