"""PCB in float64, over one tensor or over all of them as one vector."""

import torch

CASES = [
    {},
    {"scope": "tensor"},
    {"weight": [0.5, 0.3, 0.4], "lambda": 0.7, "ratio": 0.3, "clamp": 0.01},
    {"weight": [1.0, -0.5, 0.0], "scope": "tensor", "ratio": 1.0},
]


def reference_model(base, models, *, places, scope="model", **params):
    if scope == "tensor":
        return {name: reference(base[name], [m[name] for m in models], **params) for name in base}
    names = list(base)
    flat = torch.cat([base[name].flatten() for name in names])
    flats = [torch.cat([model[name].flatten() for name in names]) for model in models]
    merged = reference(flat, flats, **params)
    parts = torch.split(merged, [base[name].numel() for name in names])
    return {name: part.view(base[name].shape) for name, part in zip(names, parts, strict=True)}


def reference(base, models, *, weight=1.0, ratio=0.1, clamp=1e-4, **rest):
    weight = weight if isinstance(weight, list) else [weight] * len(models)
    deltas = [w * (model - base).flatten() for w, model in zip(weight, models, strict=True)]
    above = torch.zeros_like(deltas[0])
    below = torch.zeros_like(deltas[0])
    for delta in deltas:
        if delta.abs().max() == 0:
            continue
        sizes = delta.abs().sort().values
        many = max(1, int(clamp * sizes.numel()))
        size = delta.abs().clamp(sizes[many - 1], sizes[-many])
        score = torch.exp(len(deltas) * norm(size) ** 2) * torch.tanh(delta * sum(deltas))
        ranked = score.sort(descending=True).values
        share = norm(score.clamp(min=ranked[max(1, int(ratio * score.numel())) - 1]))
        above += delta.sign() * size * share
        below += share
    merged = (above / below.clamp(min=1e-12)).view(base.shape)
    return base + rest.get("lambda", 1.2) * merged


def norm(values):
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.ones_like(values)
