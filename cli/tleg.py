"""`surgery tleg`: layers on a line over depth."""

from typing import Annotated

import typer

from cli.writing import BASE, Writing, make, writing_options
from growth.tleg import Positions, tleg


@writing_options
def command(
    base: BASE,
    *,
    layers: Annotated[int, typer.Option(help="How many layers to make.")],
    positions: Annotated[
        Positions,
        typer.Option(
            help="Where new layer i of N lies on the line of the L: relative at i L/N, ends at "
            "i (L-1)/(N-1), index at i."
        ),
    ] = "relative",
    writing: Writing,
) -> None:
    """Fit A + l B to the layers by least squares, and make any number of layers of it (TLEG).

    Told per tensor: the share of its variance over the layers that the line explains. Where that
    is low, the result is a start for training and no more.
    """
    make(
        base,
        lambda source: tleg(source, layers=layers, positions=positions),
        suffix=f"tleg{layers}",
        writing=writing,
    )
