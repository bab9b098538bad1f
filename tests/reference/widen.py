"""WIDEN in float64, with lengths and cosines of columns as the paper has them."""

import torch

CASES = [
    {},
    {"weight": [0.5, 0.3, 0.4], "lambda": 1.5},
    {"weight": [1.0, -0.5, 0.0], "ratio": 1.5, "calibration": 0.7},
    {"ratio": 0.0},
]


def reference(base, models, *, place=None, weight=1.0, embeddings="rows", **rest):
    weight = weight if isinstance(weight, list) else [weight] * len(models)
    scale = rest.pop("lambda", 1.0)
    if base.ndim == 3:
        merged = [
            disentangled(b, [m[n] for m in models], weight, **rest) for n, b in enumerate(base)
        ]
        return base + scale * torch.stack(merged)
    if base.ndim == 2 and place and place.vocabulary and embeddings == "rows":
        return base + scale * disentangled(base.T, [m.T for m in models], weight, **rest).T
    if base.ndim == 2:
        return base + scale * disentangled(base, models, weight, **rest)
    sizes = torch.stack([(model - base).abs() for model in models])
    scores = importance(sizes.view(len(models), -1), **rest).view(sizes.shape)
    return base + scale * weighed(base, models, weight, scores)


def weighed(base, models, weight, scores):
    parts = zip(models, weight, scores, strict=True)
    return sum(w * (model - base) * score for model, w, score in parts)


def disentangled(base, models, weight, **rest):
    lengths = base.norm(dim=0)
    longer = torch.stack([(model.norm(dim=0) - lengths).abs() for model in models])
    cosines = [torch.cosine_similarity(model, base, dim=0) for model in models]
    turned = torch.stack([1 - cosine for cosine in cosines])
    rest["divisor"] = base.shape[1]
    scores = (importance(ranks(longer), **rest) + importance(ranks(turned), **rest)) / 2
    return weighed(base, models, weight, scores)


def ranks(changes):
    found = torch.empty_like(changes)
    for row, change in zip(found, changes, strict=True):
        for rank, column in enumerate(sorted(range(len(change)), key=lambda c, v=change: v[c])):
            row[column] = rank
    return found


def importance(significance, ratio=1.0, calibration=1.0, divisor=1):
    scores = torch.softmax(significance / divisor, dim=0)
    return torch.where(
        significance > significance.mean(1, keepdim=True) * ratio, calibration, scores
    )
