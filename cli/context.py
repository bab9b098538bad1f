"""`surgery context`: let a model read further, by its config."""

from typing import Annotated

import typer

from cli.writing import BASE, Writing, make, writing_options
from growth.context import Method, context


@writing_options
def command(
    base: BASE,
    *,
    factor: Annotated[float, typer.Option(help="How many times as far.")],
    method: Annotated[Method, typer.Option(help="How.")] = "yarn",
    original_max: Annotated[
        int | None,
        typer.Option(metavar="N", help="Positions trained on.  [default: what the config says]"),
    ] = None,
    writing: Writing,
) -> None:
    """Extend the context by the config alone; weights are copied.

    linear divides positions, ntk raises the base of the frequencies, dynamic does so only for
    texts beyond the original length (shorter ones are read as before), yarn interpolates the low
    frequencies. lm-infinite leaves positions alone and gives every layer a window.
    """
    make(
        base,
        lambda source: context(source, factor=factor, method=method, original_max=original_max),
        suffix=f"context{factor:g}x",
        writing=writing,
    )
