"""Select what varies, weight by energy, erase the minority's signs ("FuseChat", section 3.3)."""

import torch

from reference.vectors import agreed, deltas, largest, over_model

CASES = [
    {},
    {"select_topk": 0.3},
    {"select_topk": 0.9, "lines_alpha": 0.5},
    {"select_topk": 0.0},
    {"select_topk": 0.5, "lines_beta": 0.7},
]


def selected(vectors, share):
    """Keep the share of the non-zero variances (as sums over pairs, exact where they are equal)."""
    pairs = [(a, b) for n, a in enumerate(vectors) for b in vectors[n + 1 :]]
    variance = sum((a - b) ** 2 for a, b in pairs)
    count = int(share * int((variance != 0).sum()))
    mask = torch.from_numpy(largest(variance, count)).view(variance.shape)
    return [v * mask for v in vectors]


def merged(vectors, share):
    vectors = selected(vectors, share) if share < 1 else vectors
    energy = [float((v**2).sum()) for v in vectors]
    weight = [e / sum(energy) if sum(energy) else 1.0 for e in energy]
    return agreed(vectors, weight, True, elect="raw")


def reference_model(base, models, *, places, select_topk=1.0, **lines):
    return over_model(
        lambda n: merged(deltas(base[n], [m[n] for m in models]), select_topk),
        base,
        models,
        places,
        **lines,
    )
