"""`surgery tall`: one task vector and a mask of bits for each task."""

from typing import Annotated, Any

import typer

from cli.multitask import MODELS, NAMES, group, make_store
from cli.writing import BASE, Writing, writing_options
from surgery.errors import RecipeError


def build(name: str) -> Any:  # noqa: ANN401 - typer's own type
    """Return the group under the name of the command."""
    return group(name, command, build_command)


def command() -> None:
    """Keep many tuned models as the sum of their task vectors, with a mask for each (TALL masks).

    `build` writes a store, `task` makes one task's model of it; the base is needed for both. To
    merge into one model by the same masks: surgery merge consensus.
    """


@writing_options
def build_command(
    base: BASE,
    models: MODELS,
    *,
    name: NAMES = None,
    lambda_: Annotated[
        str,
        typer.Option(
            "--lambda",
            metavar="VALUE",
            help="How much of the sum a weight must make up to be a task's: a number for all, or "
            "one for each with commas. The authors choose from 0.2 to 0.6 on held-out data.",
        ),
    ] = "0.4",
    writing: Writing,
) -> None:
    """Write a store of the sum and masks.

    A weight is a task's where |own| > lambda * |sum - own| (arXiv 2405.07813).
    """
    bounds = _numbers(lambda_)
    if len(bounds) == 1:
        bounds *= len(models)
    make_store(base, models, name, writing, kind="tall", bounds=bounds)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        place = f"--lambda {text}"
        raise RecipeError(place, "is no number", "write 0.4, or 0.3,0.5 for two models") from error
