"""`surgery lesa`: layers predicted from their neighbours."""

from typing import Annotated

import typer

from cli.writing import BASE, Writing, make, writing_options
from growth.lesa import Norms, lesa


@writing_options
def command(
    base: BASE,
    *,
    insert: Annotated[
        str | None,
        typer.Option(metavar="LAYERS", help='Layers that a new one follows, such as "3,5-7".'),
    ] = None,
    blocks: Annotated[
        int | None, typer.Option(help="How many new layers, in the last gaps between layers.")
    ] = None,
    norms: Annotated[
        Norms,
        typer.Option(help="New norms and biases: the first layer's, or the neighbours' mean."),
    ] = "first",
    seed: Annotated[int, typer.Option(help="Seed of the small networks.")] = 0,
    writing: Writing,
) -> None:
    """Insert layers whose matrices a small network predicts from their neighbours (LESA).

    Weights only: one network for each kind of matrix, trained on BASE's own layers. Told per
    kind: how much of the known layers it explains. surgery.json names the new layers under
    `trainable_layers`.
    """
    make(
        base,
        lambda source: lesa(source, insert=insert, blocks=blocks, norms=norms, seed=seed),
        suffix="lesa",
        writing=writing,
    )
