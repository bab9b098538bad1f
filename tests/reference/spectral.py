"""What the references of methods on singular values share: which tensors are matrices, and SVDs."""

import torch


def per_model(value, models):
    return value if isinstance(value, list) else [value] * len(models)


def merged(base, models, merge, *, place=None, weight=1.0, others="mean", **rest):
    """Base plus lambda times `merge(task vectors)` for matrices, experts one by one."""
    embeddings = rest.pop("embeddings", "mean")
    scale = rest.pop("lambda", 1.0)
    if "lines_alpha" in rest:
        alpha = rest.pop("lines_alpha")
        scale *= alpha + rest.pop("lines_beta", 1 - alpha) * (place.depth or 0.0)
    weight = per_model(weight, models)
    deltas = [w * (model - base) for w, model in zip(weight, models, strict=True)]
    rule = others if base.ndim < 2 else (embeddings if place and place.vocabulary else "svd")
    if rule != "svd":
        share = {"mean": 1 / len(models), "sum": 1.0, "base": 0.0}[rule]
        return base + scale * share * sum(deltas)
    if base.ndim == 3:
        each = [merge([d[n] for d in deltas], **rest) for n in range(len(base))]
        return base + scale * torch.stack(each)
    return base + scale * merge(deltas, **rest)


def svd(x, *, largest=None, tolerance=1e-5, most=None):
    """The thin SVD without singular values that count as zero."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    rank = int((s > tolerance * (largest or float(s[0]))).sum())
    rank = rank if most is None else min(rank, most)
    return u[:, :rank], s[:rank], vh[:rank]


def polar(x):
    """The nearest matrix with orthonormal columns, on the range of x."""
    u, _, vh = svd(x)
    return u @ vh
