"""`surgery lora`: adapters fused into a model, extracted from one, merged."""

from pathlib import Path
from typing import Annotated, Any

import typer
import typer.main

from cli import render
from cli.writing import BASE, Writing, make, write_plan, writing_options
from surgery.checkpoint import Checkpoint
from surgery.lora.decompose import Method
from surgery.lora.fuse import fuse

ADAPTERS = Annotated[
    list[str],
    typer.Argument(metavar="ADAPTER...", help="Directories or hub refs of LoRA adapters."),
]

SAVED = Annotated[
    str, typer.Option(help="What the factors are stored as: float32, bfloat16 or float16.")
]
FILTERS = "a part of module names, glob:PATTERN or regex:PATTERN; several times for several."


def build(name: str) -> Any:  # noqa: ANN401 - click's own type
    """Return the group under the name of the command."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.callback(no_args_is_help=True)(command)
    for single in (fuse_command, extract_command):
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


@writing_options
def extract_command(
    base: BASE,
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="A model tuned from BASE.")],
    *,
    rank: Annotated[
        int | None,
        typer.Option(help="Of every module; with --energy the most.  [default: 256 at most]"),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Take the smallest ranks that keep this share of the difference."),
    ] = None,
    method: Annotated[Method, typer.Option(help="How to decompose.")] = "randomized",
    include: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help=f"Only modules by {FILTERS}")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help=f"Leave out modules by {FILTERS}")
    ] = None,
    modules_to_save: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"Hold whole what differs otherwise, by {FILTERS}"),
    ] = None,
    dtype: SAVED = "float32",
    seed: Annotated[int, typer.Option(help="Of the randomised sketches.")] = 0,
    writing: Writing,
) -> None:
    """Make a LoRA adapter of the difference between two models.

    Both are read first to see what differs. Each linear layer gets the best factors of its rank;
    how much of the difference they keep is told per module and in all, and so is what differs
    elsewhere.
    """
    from surgery.lora.extract import energy_in_all, extract

    limits = writing.limits()
    sources = (writing.open(base), writing.open(tuned))
    with render.progress("measure") as progress:
        plan = extract(
            *sources,
            rank=rank,
            energy=energy,
            method=method,
            include=include or (),
            exclude=exclude or (),
            modules_to_save=modules_to_save or (),
            dtype=dtype,
            seed=seed,
            workers=writing.workers,
            memory=limits["memory"],
            progress=progress,
        )
    write_plan(
        plan,
        writing.output or _beside(sources[1], "lora"),
        writing,
        in_all=lambda told: {"energy_in_all": energy_in_all(plan, told)},
    )


def _beside(source: Checkpoint, suffix: str) -> Path:
    """Return a directory beside a source, which may be a file."""
    folder = Path() if source.revision else source.root if source.bare else source.root.parent
    return folder / f"{source.name}-{suffix}"
