"""TALL masks (arXiv 2405.07813, equations 4 and 5) in float64."""


def masks(vectors, bounds):
    total = sum(vectors)
    return [v.abs() > b * (total - v).abs() for v, b in zip(vectors, bounds, strict=True)]


def reference_model(base, models, *, bounds, vector_dtype=None, **_):
    """Every task's model; the stored sum is rounded once to a dtype."""
    restored = [{} for _ in models]
    for name in base:
        vectors = [model[name] - base[name] for model in models]
        total = sum(vectors)
        kept = total.to(vector_dtype).double() if vector_dtype else total
        for task, mask in enumerate(masks(vectors, bounds)):
            restored[task][name] = base[name] + mask * kept
    return restored
