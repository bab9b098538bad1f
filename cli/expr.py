"""`surgery merge expr`: any linear expression of models."""

from collections.abc import Sequence
from typing import Annotated

import typer

from cli.recipes import make_recipe
from cli.writing import Writing, writing_options
from surgery.errors import RecipeError
from surgery.expression import parse_expression
from surgery.recipe import merge_models

SUMMARY = "Compute a linear expression of models, such as new + 0.8 * (tuned - old)."


@writing_options
def command(
    expression: Annotated[
        str, typer.Argument(metavar="EXPRESSION", help='Such as "new + 0.8 * (tuned - old)".')
    ],
    *,
    model: Annotated[
        list[str],
        typer.Option("--model", metavar="NAME=MODEL", help="What a name stands for; once each."),
    ],
    dtype: Annotated[
        str | None, typer.Option(help="Of the output.  [default: the models' own]")
    ] = None,
    writing: Writing,
) -> None:
    """Compute a linear expression of models, such as new + 0.8 * (tuned - old).

    Analogies, negations and differences of any models, in one pass and one rounding. Config and
    tokenizer are those of the model that is named first.
    """
    places = _places(model)
    factors = parse_expression(expression, place="EXPRESSION")
    for name in factors:
        if name not in places:
            raise RecipeError("EXPRESSION", f"names {name}", f"say what it is: --model {name}=PATH")
    for name in places:
        if name not in factors:
            raise RecipeError(f"--model {name}", "is not in the expression", "leave it out")
    models = [places[name] for name in factors]
    recipe = merge_models(
        "linear", models, weight=list(factors.values()), normalize=False, out_dtype=dtype
    )
    make_recipe(recipe, writing)


def _places(given: Sequence[str]) -> dict[str, str]:
    places: dict[str, str] = {}
    for text in given:
        name, equals, place = text.partition("=")
        if not (equals and name.isidentifier() and place):
            raise RecipeError(f"--model {text}", "is not of the form NAME=MODEL")
        if name in places:
            raise RecipeError(f"--model {text}", f"says a second time what {name} is")
        places[name] = place
    return places
