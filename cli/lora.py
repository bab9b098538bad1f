"""`surgery lora`: adapters fused into a model, extracted from one, merged."""

from typing import Annotated, Any

import typer
import typer.main

from cli.writing import BASE, Writing, make, writing_options
from surgery.lora.fuse import fuse

ADAPTERS = Annotated[
    list[str],
    typer.Argument(metavar="ADAPTER...", help="Directories or hub refs of LoRA adapters."),
]


def build(name: str) -> Any:  # noqa: ANN401 - click's own type
    """Return the group under the name of the command."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.callback(no_args_is_help=True)(command)
    for single in (fuse_command,):
        app.command(single.__name__.removesuffix("_command"))(single)
    found = typer.main.get_command(app)
    found.name = name
    return found


def command() -> None:
    """Fuse LoRA adapters into a model, extract one from a tuned model, merge several.

    Wherever a command takes a model, BASE+ADAPTER names a base with an adapter added.
    """


@writing_options
def fuse_command(base: BASE, adapters: ADAPTERS, *, writing: Writing) -> None:
    """Write a base with adapters as an ordinary model.

    W + scale * B @ A, computed in float32 and rounded once to the base's dtype; several adapters
    are added one after the other, and the sum is rounded. DoRA, rank-stabilised LoRA, whole
    modules, biases, new tokens and fused experts are taken as peft runs them.
    """
    make("+".join((base, *adapters)), fuse, suffix="fused", writing=writing)
