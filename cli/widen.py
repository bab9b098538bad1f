"""`surgery widen`: multiply a model's width, or grow it to a size."""

from typing import Annotated, Literal

import typer

from cli.writing import BASE, Writing, make, writing_options
from growth.widen import widen


@writing_options
def command(
    base: BASE,
    *,
    factor: Annotated[
        int | None, typer.Option(metavar="N", help="Multiply all widths by N, exactly.")
    ] = None,
    to: Annotated[
        int | None, typer.Option(metavar="HIDDEN", help="Grow to this hidden size (bert2BERT).")
    ] = None,
    intermediate_size: Annotated[
        int | None, typer.Option(help="Feed-forward size, with --to.  [default: in proportion]")
    ] = None,
    method: Annotated[
        Literal["fpi", "aki"],
        typer.Option(help="With --to: keep the function, or take copies from the next layer."),
    ] = "fpi",
    noise: Annotated[
        float,
        typer.Option(
            metavar="STD",
            help="With --factor: set copies apart by this share of each weight, 0.3 for instance.",
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of noise and of random choices.")] = 0,
    writing: Writing,
) -> None:
    """Widen a model by copying its units (HyperCloning, LEMON, bert2BERT).

    With --factor the result computes what BASE does, with noise too. With --to it is exact where
    every unit of the stream is copied equally often, and near otherwise.
    """
    make(
        base,
        lambda source: widen(
            source,
            factor=factor,
            to=to,
            intermediate_size=intermediate_size,
            method=method,
            noise=noise,
            seed=seed,
        ),
        suffix=f"widen{factor or to}",
        writing=writing,
    )
