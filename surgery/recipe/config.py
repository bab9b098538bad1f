"""The output's config: the donor's, with what the merge changes."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from surgery.plan import Step
from surgery.recipe.inputs import Model
from surgery.recipe.layout import Layout
from surgery.recipe.schema import DTYPES, Recipe

NAMES = {code: name for name, code in DTYPES.items()}


def merged_config(
    recipe: Recipe,
    donor: Model,
    models: Mapping[str, Model],
    layout: Layout,
    steps: Sequence[Step],
) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """Return the config, None for a bare output, and what the user should know of it."""
    if donor.checkpoint.config is None:
        return None, ()
    config = deepcopy(donor.checkpoint.config)
    return config, ()
