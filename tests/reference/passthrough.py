"""One model in float64."""

CASES = [{}, {"scale": 0.3}, {"scale": -2.0}, {"scale": None}]
ENDPOINTS = [({}, 0), ({"scale": 1.0}, 0)]


def reference(base, models, *, scale=None):
    (model,) = models
    return model if scale is None else scale * model


def returns_itself(params):
    """Unless it is scaled."""
    return params.get("scale") is None
