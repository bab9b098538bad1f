"""`surgery soup`: the plain average of models."""

from typing import Annotated

import typer

from cli.merge import MODELS
from cli.recipes import make_recipe
from cli.writing import Writing, writing_options
from surgery.errors import RecipeError
from surgery.recipe import merge_models


@writing_options
def command(
    models: MODELS,
    *,
    dtype: Annotated[
        str | None, typer.Option(help="Of the output.  [default: the models' own]")
    ] = None,
    writing: Writing,
) -> None:
    """Average models, each with the same weight (the uniform soup).

    For other weights: surgery merge linear.
    """
    if len(models) == 1:
        raise RecipeError("soup", f"has one model, {models[0]}", "name those to average with it")
    make_recipe(merge_models("linear", models, weight=1.0, out_dtype=dtype), writing)
