"""`surgery coalesce`, `decoalesce` and `interpolate`: the operators of multi-level training."""

from typing import Annotated, Any

import typer
import typer.main

from cli.writing import BASE, Writing, default_output, make, write_plan, writing_options
from growth.levels import Pairing, coalesce, decoalesce, interpolate

PAIRS = Annotated[
    Pairing,
    typer.Option(help="Which units: i and i + n/2 (stacked), or 2i and 2i + 1. Heads stay whole."),
]
LAYER_PAIRS = Annotated[
    Pairing, typer.Option(help="Which layers: 2i and 2i + 1 (adjacent), or i and i + L/2.")
]


def build(name: str) -> Any:  # noqa: ANN401 - click's own type
    """Return one of the commands."""
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name)(COMMANDS[name])
    found = typer.main.get_command(single)
    found.name = name
    return found


@writing_options
def coalesce_command(
    base: BASE,
    *,
    width: Annotated[
        bool, typer.Option("--width/--no-width", help="Average pairs of units and heads.")
    ] = True,
    depth: Annotated[
        bool, typer.Option("--depth/--no-depth", help="Average pairs of layers.")
    ] = True,
    pairs: PAIRS = "stacked",
    layer_pairs: LAYER_PAIRS = "adjacent",
    writing: Writing,
) -> None:
    """Halve a model in width and depth, to train it cheaply for a while.

    The result loads by the same class. `decoalesce` brings it back to the size of BASE, and
    `interpolate` mixes that with BASE: together they are a V-cycle.
    """
    asked: dict[str, Any] = {"width": width, "depth": depth}
    asked |= {"pairs": pairs, "layer_pairs": layer_pairs}
    make(base, lambda source: coalesce(source, **asked), suffix="coalesced", writing=writing)


@writing_options
def decoalesce_command(
    small: Annotated[str, typer.Argument(metavar="SMALL", help="A coalesced model.")],
    *,
    like: Annotated[
        str, typer.Option(metavar="MODEL", help="The model it was made of: config and sizes.")
    ],
    pairs: PAIRS = "stacked",
    layer_pairs: LAYER_PAIRS = "adjacent",
    writing: Writing,
) -> None:
    """Give a coalesced model the sizes that it had.

    In width the result computes what SMALL does; in depth each layer is there twice. Give the
    same --pairs and --layer-pairs as when it was coalesced.
    """
    writing.limits()
    source, model = writing.open(small), writing.open(like)
    plan = decoalesce(source, model, pairs=pairs, layer_pairs=layer_pairs)
    write_plan(plan, writing.output or default_output(source, "decoalesced"), writing)


@writing_options
def interpolate_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As it was before.")],
    decoalesced: Annotated[
        str, typer.Argument(metavar="DECOALESCED", help="What came back, of the same sizes.")
    ],
    *,
    alpha: Annotated[float, typer.Option(help="Share of DECOALESCED, from 0 to 1.")] = 0.25,
    writing: Writing,
) -> None:
    """Move a model a share of the way to a de-coalesced one: (1 - a) W + a W'."""
    writing.limits()
    source, other = writing.open(model), writing.open(decoalesced)
    plan = interpolate(source, other, alpha=alpha)
    write_plan(plan, writing.output or default_output(source, "interpolated"), writing)


COMMANDS = {
    "coalesce": coalesce_command,
    "decoalesce": decoalesce_command,
    "interpolate": interpolate_command,
}
