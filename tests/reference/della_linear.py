"""Drop small elements more often ("DELLA-Merging", section 3.1), and add up."""

import numpy as np
import torch

from reference.vectors import added_up, deltas, layer_factor, per_model, rescaled

CASES = [
    {"weight": [1.0, 0.5, 0.3], "density": [0.5, 0.3, 1.0]},
    {"weight": [1.0, -0.5, 0.3], "density": 0.4, "rescale": False, "lambda": 0.6},
    {"weight": [1.0, 0.5, 0.3], "density": 0.4, "epsilon": 0.3, "rescale": "inverse"},
    {"weight": 1.0, "density": 0.7, "epsilon": [0.1, 0.0, 0.2], "lines_alpha": 0.3},
]
ENDPOINTS = [({"weight": [0.0, 1.0, 0.0]}, 1)]
ORDERED = "masks are drawn by a model's place"


def pruned(delta, bits, density, epsilon, inverse):
    """Keep each element with the probability of its rank in its row.

    Of equal magnitudes, the lowest of 32 bits chooses between the lowest and the highest rank;
    the 31 others are compared with the probability. `inverse` divides by the mean of both.
    """
    shape = delta.shape
    rows = shape[0] if delta.dim() > 1 else 1
    values = delta.reshape(rows, -1).abs().numpy()
    columns = values.shape[1]
    drawn = bits.reshape(rows, -1).numpy()
    result = delta.reshape(rows, -1).clone()
    for row in range(rows):
        ordered = np.sort(values[row])
        lowest = np.searchsorted(ordered, values[row], side="left")
        highest = np.searchsorted(ordered, values[row], side="right") - 1
        rank = np.where(drawn[row] & 1, highest, lowest)
        if columns == 1:
            probability = mean = np.full(1, density)
        else:
            probability = density - epsilon + 2 * epsilon * rank / (columns - 1)
            mean = density - epsilon + epsilon * (lowest + highest) / (columns - 1)
        kept = (drawn[row] >> 1) / 2**31 < probability
        result[row] *= torch.from_numpy(kept / mean if inverse else kept * 1.0)
    return result.view(shape)


def magpruned(vectors, density, epsilon, bits, rescale):
    how = {True: "l1", False: "none"}.get(rescale, rescale)
    after = [
        pruned(v, bits(n), share, room, how == "inverse") if share < 1 else v
        for n, (v, share, room) in enumerate(zip(vectors, density, epsilon, strict=True))
    ]
    return rescaled(vectors, after, "l1", density) if how == "l1" else after


def reference(base, models, *, bits, place, weight, density=1.0, epsilon=0.15, **params):
    density, epsilon = per_model(density, models), per_model(epsilon, models)
    vectors = deltas(base, models)
    vectors = magpruned(vectors, density, epsilon, bits, params.get("rescale", "l1"))
    merged = added_up(vectors, per_model(weight, models), params.get("normalize", False))
    factor = layer_factor(place, params.get("lines_alpha"), params.get("lines_beta"))
    return base + params.get("lambda", 1.0) * factor * merged
