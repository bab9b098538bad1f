"""Weights of models."""

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.errors import RecipeError

SMALLEST = 1e-8  # a sum of weights below this is taken for zero


def shares(weight: Sequence[float], *, normalize: bool) -> list[float]:
    """Return the weights, with `normalize` divided by their sum.

    Raises:
        RecipeError: `normalize` with weights that sum to zero.
    """
    if not normalize:
        return list(weight)
    total = sum(weight)
    if abs(total) < SMALLEST:
        told = ", ".join(f"{w:g}" for w in weight)
        fact = f"cannot be normalised: {told} sum to zero"
        raise RecipeError("weight", fact, "set normalize to false, or change a weight")
    return [w / total for w in weight]


def check_shares(values: Mapping[str, Any]) -> None:
    """Check at plan time what `shares` would refuse."""
    shares(values["weight"], normalize=values["normalize"])
