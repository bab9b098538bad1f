"""Shared changes averaged, unique ones times a factor from the tensor's own overlap; float64."""

from reference.ramplus import CASES, changes, merged, ours

__all__ = ["CASES", "reference"]


def reference(base, models, *, epsilon=1e-5, r=0.1, alpha=0.2):
    found = changes(base, models, epsilon)
    return base + merged(found, *ours(found), r, alpha)
