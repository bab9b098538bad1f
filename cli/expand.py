"""`surgery expand`: insert identity blocks."""

from typing import Annotated

import typer

from cli.writing import BASE, Writing, make, writing_options
from growth.expand import expand


@writing_options
def command(
    base: BASE,
    *,
    blocks: Annotated[int, typer.Option(help="How many identity blocks to insert.")],
    writing: Writing,
) -> None:
    """Insert identity blocks that change nothing until they are trained (LLaMA-Pro).

    The result computes exactly what BASE does. surgery.json names the new layers under
    `trainable_layers`: train those alone to add knowledge without losing any.
    """
    make(
        base,
        lambda source: expand(source, blocks=blocks),
        suffix=f"expand{blocks}",
        writing=writing,
    )
