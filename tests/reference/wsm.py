"""The oldest checkpoint, and the updates since as a decayed rate would have made them, float64."""

import math

CASES = [{}, {"curve": "linear"}, {"curve": "cosine"}, {"curve": "cosine", "last": 2}, {"last": 1}]
ENDPOINTS = [({"last": 1}, 2)]
ORDERED = True


def reference(base, models, *, curve="1-sqrt", last=None):
    newest = models if last is None else models[-last:]
    merged = newest[0]
    for n in range(1, len(newest)):
        x = n / len(newest)
        rate = {
            "linear": 1 - x,
            "cosine": 0.5 * (1 + math.cos(math.pi * x)),
            "1-sqrt": 1 - math.sqrt(x),
        }[curve]
        merged = merged + rate * (newest[n] - newest[n - 1])
    return merged
