"""`surgery run`: carry out a recipe or a pipeline file."""

from pathlib import Path
from typing import Annotated

import typer

from cli.pipeline import is_pipeline, run_pipeline
from cli.recipes import make_recipe
from cli.writing import Writing, writing_options
from surgery.errors import RecipeError
from surgery.recipe import parse_recipe
from surgery.recipe.reader import read_documents


@writing_options
def command(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE.yaml", help="A recipe, ours or mergekit's, or a pipeline."),
    ],
    *,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print each tensor's numbers and why, write nothing.")
    ] = False,
    only: Annotated[
        str | None, typer.Option(metavar="STEP", help="Run one step of a pipeline.")
    ] = None,
    writing: Writing,
) -> None:
    """Carry out a recipe: which models, how they are merged, and every parameter.

    A mergekit configuration runs as it is. A file with steps is a pipeline: each step is a
    command, and is skipped when nothing that it depends on has changed; -o is their folder.
    """
    documents = read_documents(file)
    if is_pipeline(documents[0]):
        if explain or len(documents) > 1:
            fact = "is for recipes" if explain else "holds more than one document"
            raise RecipeError(
                "--explain" if explain else str(file), fact, "a pipeline stands alone"
            )
        run_pipeline(documents[0], writing, only=only)
        return
    if only is not None:
        raise RecipeError("--only", "is for pipelines, and this is a recipe", "drop it")
    (recipe,) = (parse_recipe(document) for document in documents)
    make_recipe(recipe, writing, explain=explain)
