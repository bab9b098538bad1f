"""`surgery emr`: one model and a mask of bits for each task."""

from typing import Annotated, Any, Literal

import typer

from cli.multitask import MODELS, NAMES, group, make_store
from cli.writing import BASE, Writing, writing_options


def build(name: str) -> Any:  # noqa: ANN401 - typer's own type
    """Return the group under the name of the command."""
    return group(name, command, build_command)


def command() -> None:
    """Keep many tuned models as one, with a mask of one bit a weight for each (EMR-Merging).

    `build` writes a store, `task` makes one task's model of it; the base is needed for both.
    """


@writing_options
def build_command(
    base: BASE,
    models: MODELS,
    *,
    name: NAMES = None,
    rescaler: Annotated[
        Literal["elements", "tensors"],
        typer.Option(
            help="What a task's factor is made of: sums over all weights, as the paper has it, "
            "or sums of each tensor's mean, as the authors' code."
        ),
    ] = "elements",
    writing: Writing,
) -> None:
    """Write a store: elect, mask, rescale.

    Every weight of the shared model is that of the tuned model that changed it most in the
    direction elected; each task's mask tells where it agrees, and one factor per task makes up
    for the length. arXiv 2405.17461.
    """
    make_store(base, models, name, writing, kind="emr", rescaler=rescaler)
