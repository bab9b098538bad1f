"""Mixtures of experts in a recipe: all in the donor's layout, matched where that is asked for."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from surgery.anatomy import anatomy
from surgery.layouts import in_layout
from surgery.recipe.inputs import Model
from surgery.recipe.schema import Recipe


def in_one_layout(models: Mapping[str, Model], donor: str) -> dict[str, Model]:
    """Return the models with experts laid out as the donor's, whose layout the output has.

    Raises:
        CheckpointError: experts that have no counterpart.
    """
    return {ref: _laid_out(model, models[donor]) for ref, model in models.items()}


def _laid_out(model: Model, donor: Model) -> Model:
    if model is donor or model.parts is None or donor.parts is None:
        return model
    checkpoint = in_layout(model.checkpoint, like=donor.checkpoint)
    if checkpoint is model.checkpoint:
        return model
    return replace(model, checkpoint=checkpoint, parts=anatomy(checkpoint))


def matched(recipe: Recipe, models: Mapping[str, Model]) -> tuple[dict[str, Model], dict[str, Any]]:
    """Return the models with experts where the base has like ones, and what to record of it.

    Without a base, the donor is what the others are matched with. Weights are read for it.

    Raises:
        CheckpointError: a model without experts, or of another architecture.
    """
    if not recipe.match_experts:
        return dict(models), {}
    from surgery.alignment import match_experts  # brings numpy, which help does without

    reference = models[recipe.base or recipe.donor]
    found, facts = {}, {}
    for ref, model in models.items():
        found[ref] = model
        if model is not reference:
            matching = match_experts(reference.checkpoint, model.checkpoint)
            found[ref] = replace(model, checkpoint=matching.checkpoint)
            facts[model.checkpoint.name] = dict(matching.facts)
    return found, {"experts_matched": facts}
