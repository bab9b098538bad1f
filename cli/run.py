"""`surgery run`: carry out a recipe or a pipeline file."""

from pathlib import Path
from typing import Annotated

import typer

from cli.chain import chained
from cli.pipeline import is_pipeline, run_pipeline, run_tasks
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
        str | None,
        typer.Option(metavar="STEP", help="Run one step of a pipeline, or one of several recipes."),
    ] = None,
    writing: Writing,
) -> None:
    """Carry out a recipe: which models, how they are merged, and every parameter.

    A mergekit configuration runs as it is; of several documents, later ones may take the result
    of an earlier one by its name. A file with steps is a pipeline: each step is a command. Such
    steps are skipped when nothing that they depend on has changed, and -o is their folder.
    Without -o, the output is named after the file, in the working directory.
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
    if only is not None and len(documents) == 1:
        raise RecipeError("--only", "is for pipelines, and this is one recipe", "drop it")
    recipes = [parse_recipe(document) for document in documents]
    if len(recipes) == 1:
        make_recipe(recipes[0], writing, explain=explain, file=file)
        return
    if explain:
        fact = "is for one recipe, and the file holds more"
        raise RecipeError("--explain", fact, "explain each in a file of its own")
    run_tasks(chained(recipes, writing), writing.output or Path(file.stem), writing, only=only)
