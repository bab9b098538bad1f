"""What can be averaged, decided from headers before anything is loaded."""

from collections.abc import Mapping, Sequence

from surgery.checkpoint import open_checkpoint
from surgery.errors import RecipeError
from surgery.plan import TensorSpec
from surgery.recipe import compile, merge_models
from surgery.recipe.inputs import Open
from surgery.vocabulary import explain_difference


def outputs_of(
    place: str,
    models: Sequence[str],
    *,
    out_dtype: str | None = None,
    open_one: Open = open_checkpoint,
) -> Mapping[str, TensorSpec]:
    """Return the tensors that an average of the models has; no weight is read.

    Args:
        place: what a refusal names.

    Raises:
        RecipeError: fewer than two models, one named twice, or another vocabulary.
        PlanError: the models do not fit together.
        CheckpointError: a model is missing or broken.
    """
    if len(models) < 2:  # noqa: PLR2004 - an average
        named = f"has one model, {models[0]}" if models else "has no model"
        raise RecipeError(place, named, "name those to average with it")
    for number, model in enumerate(models):
        if model in models[:number]:
            raise RecipeError(place, f"names {model} twice", "name each model once")
    opened = {model: open_one(model) for model in models}
    for model, checkpoint in opened.items():
        if checkpoint.bare:
            fact = "is a weight file alone, which cannot be measured"
            raise RecipeError(model, fact, "name a directory with a config.json and a tokenizer")
    difference = explain_difference(list(opened.values()))
    if difference is not None:
        fact = f"the vocabularies differ: {difference}"
        raise RecipeError(place, fact, "bring them to one first, with surgery vocab transplant")
    recipe = merge_models("linear", models, weight=1.0, out_dtype=out_dtype)
    return compile(recipe, open=lambda ref: opened[ref]).outputs
