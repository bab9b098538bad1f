"""`surgery export`: a linearized model for the programs of others."""

from typing import Annotated

import typer

from cli.writing import BASE, Writing, make, writing_options
from surgery.linearize.export import To, export


@writing_options
def command(
    base: BASE,
    *,
    to: Annotated[To, typer.Option(help="The layout: of flash-linear-attention, or Qwen3-Next.")],
    writing: Writing,
) -> None:
    """Write a linearized model in the layout of a class that others load and serve.

    Only where that class computes the same function; else the reason is told. fla takes models of
    the method gla all of whose layers are linear; qwen3-next those of gated-delta made from
    Qwen3, with softmax attention kept in one layer or more.

    Example: surgery export linear --to qwen3-next -o served
    """
    make(base, lambda source: export(source, to=to), suffix=to, writing=writing)
