"""KnOTS with TIES in float64: one SVD of the task vectors side by side, all held at once."""

import torch

from reference.spectral import merged, svd

CASES = [
    {},
    {"weight": [0.5, 0.3, 0.4], "lambda": 1.5, "density": 1.0},
    {"weight": [1.0, -0.5, 0.2], "density": 0.5, "others": "sum"},
]


def reference(base, models, **params):
    params.setdefault("lambda", 0.6)
    return merged(base, models, tied, **params)


def tied(deltas, density=0.2):
    u, s, vh = svd(torch.cat(deltas, dim=1))
    aligned = [torch.diag(s) @ v for v in torch.split(vh, deltas[0].shape[1], dim=1)]
    return u @ ties(aligned, density)


def ties(vectors, density):
    trimmed = []
    for vector in vectors:
        sizes = vector.abs().flatten().sort(descending=True).values
        least = sizes[max(1, int(density * vector.numel())) - 1]
        trimmed.append(torch.where(vector.abs() >= least, vector, 0.0))
    elected = sum(trimmed).sign()
    agree = [torch.where(one.sign() == elected, one, 0.0) for one in trimmed]
    counts = sum((one != 0).double() for one in agree)
    return sum(agree) / counts.clamp_min(1)
