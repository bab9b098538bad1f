"""`surgery lora`: adapters fused into a model, extracted from one, merged."""

from pathlib import Path
from typing import Annotated, Any

import typer
import typer.main

from cli import render
from cli.writing import BASE, Writing, make, write_plan, writing_options
from surgery.checkpoint import Checkpoint
from surgery.errors import RecipeError
from surgery.lora.combine import Method
from surgery.lora.decompose import Method as Svd
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
    for single in (fuse_command, extract_command, merge_command):
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
    method: Annotated[Svd, typer.Option(help="How to decompose.")] = "randomized",
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
    seed: Annotated[int, typer.Option(help="Seed of the randomised sketches.")] = 0,
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


@writing_options
def merge_command(
    adapters: ADAPTERS,
    *,
    method: Annotated[Method, typer.Option(help="How to merge.")] = "cat",
    weight: Annotated[
        str | None,
        typer.Option(metavar="W1,W2,...", help="One for each adapter.  [default: 1 for each]"),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="Of all methods but cat.  [default: a module's largest]"),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="Share of elements kept by ties, dare and magnitude_prune."),
    ] = None,
    svd: Annotated[Svd, typer.Option(help="How elementwise results are decomposed.")] = (
        "randomized"
    ),
    dtype: SAVED = "float32",
    seed: Annotated[int, typer.Option(help="Seed of masks and sketches.")] = 0,
    writing: Writing,
) -> None:
    """Merge LoRA adapters of one base into one, by what they change.

    cat is the weighted sum exactly, at the sum of the ranks. svd (linear is the same) is the
    nearest to it of a lower rank. ties, dare_linear, dare_ties and magnitude_prune act on the
    elements of the changes, and are decomposed again.
    """
    from surgery.checkpoint.adapter_source import open_adapter_source
    from surgery.lora.combine import merge

    writing.limits()
    sources = [open_adapter_source(ref, allow_download=writing.allow_download) for ref in adapters]
    plan = merge(
        *sources,
        weights=_shares(weight),
        method=method,
        rank=rank,
        density=density,
        svd=svd,
        dtype=dtype,
        seed=seed,
    )
    write_plan(plan, writing.output or _beside(sources[0], "merged"), writing)


def _shares(text: str | None) -> list[float] | None:
    try:
        return [float(word) for word in text.split(",")] if text is not None else None
    except ValueError as error:
        fact = "is no list of numbers"
        raise RecipeError(f"--weight {text}", fact, "write for instance 0.7,0.3") from error


def _beside(source: Checkpoint, suffix: str) -> Path:
    """Return a directory beside a source, which may be a file."""
    folder = Path() if source.revision else source.root if source.bare else source.root.parent
    return folder / f"{source.name}-{suffix}"
