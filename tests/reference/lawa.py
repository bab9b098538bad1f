"""The mean of the newest in float64."""

CASES = [{}, {"last": 2}, {"last": 1}, {"last": 50}]
ENDPOINTS = [({"last": 1}, 2)]
ORDERED = True


def reference(base, models, *, last=None):
    newest = models if last is None else models[-last:]
    return sum(newest) / len(newest)
