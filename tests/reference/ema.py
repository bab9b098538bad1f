"""The running average in float64, step by step."""

CASES = [{}, {"decay": 0.5}, {"decay": 0.0}]
ENDPOINTS = [({"decay": 0.0}, 2)]
ORDERED = True


def reference(base, models, *, decay=0.9):
    average = models[0]
    for model in models[1:]:
        average = decay * average + (1 - decay) * model
    return average
