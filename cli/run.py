"""`surgery run`: carry out a recipe file."""

from pathlib import Path
from typing import Annotated

import typer

from cli.recipes import make_recipe
from cli.writing import Writing, writing_options
from surgery.errors import RecipeError
from surgery.recipe import Recipe, load_recipes


@writing_options
def command(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.yaml", help="A recipe, ours or mergekit's.")
    ],
    *,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print each tensor's numbers and why, write nothing.")
    ] = False,
    writing: Writing,
) -> None:
    """Carry out a recipe: which models, how they are merged, and every parameter.

    A mergekit configuration runs as it is.
    """
    (recipe,) = load_recipes(file)
    make_recipe(recipe, writing, explain=explain)
