"""Base plus a weighted sum of task vectors ("Editing models with task arithmetic", section 2)."""

from reference.vectors import added_up, deltas, over_model, per_model

CASES = [
    {"weight": [1.0, 0.5, 0.3]},
    {"weight": [1.0, -1.0, 0.5]},
    {"weight": [0.5, 0.2, -0.1], "normalize": True, "lambda": 0.7},
    {"weight": 0.4, "lines_alpha": 0.2},
    {"weight": 0.4, "lines_alpha": 0.5, "lines_beta": 1.5},
    {"weight": [0.4, 0.3, 0.2], "lines_beta": 0.8},
]
ENDPOINTS = [({"weight": [0.0, 1.0, 0.0]}, 1), ({"weight": 1.0, "lambda": 0.0}, "base")]


def reference_model(base, models, *, places, weight, normalize=False, **params):
    def merged(name):
        vectors = deltas(base[name], [model[name] for model in models])
        return added_up(vectors, per_model(weight, models), normalize)

    params["lambda_"] = params.pop("lambda", 1.0)
    return over_model(merged, base, models, places, **params)
