"""Refuse numbers of a linearization's training that make no sense (no torch)."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from surgery.errors import RecipeError
from surgery.recover.settings import longest_context

if TYPE_CHECKING:
    from surgery.linearize.ask import Training

AT_LEAST = {"context": 8, "batch_tokens": 8, "micro_tokens": 8, "rank": 1}
POSITIVE = ("lr", "transfer_lr", "kd_lr", "lora_alpha")


def check_numbers(asked: "Training") -> None:
    """Refuse them by the names that the user gave, whatever stages there are.

    Raises:
        RecipeError: the first of them.
    """
    for name, least in AT_LEAST.items():
        value = getattr(asked, name)
        if value is not None and value < least:
            raise RecipeError(f"{_option(name)} {value}", f"is below {least}")
    for name in POSITIVE:
        value = getattr(asked, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise RecipeError(f"{_option(name)} {value:g}", "is not a positive number")


def check_context(asked: "Training", model: str, config: Mapping[str, Any] | None) -> None:
    """Refuse rows longer than the model reads.

    Raises:
        RecipeError: they are.
    """
    limit = longest_context(config)
    if asked.context is not None and limit is not None and asked.context > limit:
        fact = f"is more than {model} reads, {limit} tokens"
        raise RecipeError(f"--context {asked.context}", fact, f"give {limit} or less")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
