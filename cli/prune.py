"""`surgery prune`: drop layers."""

from typing import Annotated

import typer

from cli.writing import BASE, Writing, make, writing_options
from growth.prune import prune


@writing_options
def command(
    base: BASE,
    *,
    layers: Annotated[
        str, typer.Option(metavar="RANGES", help='The layers to drop, such as "21-28".')
    ],
    writing: Writing,
) -> None:
    """Drop layers by number; ranges include both ends, and the others close up."""
    make(
        base,
        lambda source: prune(source, layers=layers),
        suffix="prune",
        writing=writing,
    )
