"""`surgery recurse`: layers tied into a loop, with factors for each depth, and back."""

import json
import os
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import typer.main

from cli import render
from cli.report import InAll
from cli.writing import (
    BASE,
    Writing,
    default_output,
    is_planning,
    make,
    write_plan,
    writing_options,
)
from growth.recurse.factor import Svd
from growth.recurse.formats import PARTS, Format, Part
from growth.recurse.loops import Init, Scheme
from growth.recurse.telling import captured
from growth.recurse.tying import relax, tie
from growth.recurse.unroll import materialize, open_tied, untie
from surgery.errors import PlanError
from surgery.plan import Plan

TIED = Annotated[
    str, typer.Argument(metavar="TIED", help="A recursive model, of `surgery recurse`.")
]
BLOCKS = Annotated[
    int, typer.Option(metavar="B", help="How often the tied layers are run through.")
]
SCHEME = Annotated[Scheme, typer.Option(help="Which block each layer becomes.")]
TIE_NORMS = Annotated[
    bool, typer.Option("--tie-norms", help="Tie norms and biases too; they stay per depth if not.")
]


def build(name: str) -> Any:  # noqa: ANN401 - click's own type
    """Return the group under the name of the command."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.callback(no_args_is_help=True)(command)
    for single in (tie_command, relax_command, materialize_command, untie_command):
        app.command(single.__name__.removesuffix("_command"))(single)
    found = typer.main.get_command(app)
    found.name = name
    return found


def command() -> None:
    """Tie layers into a loop that is run several times, and unroll such a model again.

    L layers become B loops of K = L / B blocks. A recursive model stores each shared weight once
    and carries the code that runs it.
    """


@writing_options
def tie_command(
    base: BASE,
    *,
    blocks: BLOCKS,
    init: Annotated[Init, typer.Option(help="What a block starts from.")] = "stepwise",
    scheme: SCHEME = "cycle",
    tie_norms: TIE_NORMS = False,
    format: Annotated[
        Literal["tied", "dense"], typer.Option(help="How the result is saved.")
    ] = "tied",
    writing: Writing,
) -> None:
    """Tie layers alone: the model has to be trained again.

    cycle runs all blocks in order, B times; sequence runs each block B times in a row;
    middle-cycle leaves the first and the last layer alone. A block starts as evenly spaced
    layers (stepwise), as the mean of the layers it stands for (average), or as the first layers
    (lower).
    """
    make(
        base,
        lambda source: tie(
            source, blocks=blocks, init=init, scheme=scheme, tie_norms=tie_norms, format=format
        ),
        suffix=f"tied{blocks}",
        writing=writing,
    )


@writing_options
def relax_command(
    base: BASE,
    *,
    blocks: BLOCKS,
    rank: Annotated[
        int | None, typer.Option(help="Of every linear layer; with --energy the most.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Take the smallest ranks that keep this share of each difference."),
    ] = None,
    init: Annotated[Init, typer.Option(help="What a block starts from.")] = "average",
    scheme: SCHEME = "cycle",
    tie_norms: TIE_NORMS = False,
    format: Annotated[Format, typer.Option(help="How the result is saved.")] = "tied",
    svd: Annotated[
        Svd | None,
        typer.Option(
            help="How differences are decomposed.  [default: randomized, with --energy gram]"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of sketches and random factors.")] = 0,
    writing: Writing,
) -> None:
    """Tie layers, and give every depth factors of low rank.

    Every linear layer gets them, the nearest to what the depth's own weights are beyond the tied
    ones, so that at full rank the model computes what it did. How much of the difference is kept
    is told for each kind of linear layer and in all.

    tied is a recursive model; dense a stock one with the factors added; peft a stock model of K
    layers in OUTPUT/base and an adapter that repeats them in OUTPUT/adapter (Llama and Mistral).
    """
    limits = writing.limits()
    source = writing.open(base)
    asked: dict[str, Any] = {"blocks": blocks, "rank": rank, "energy": energy, "init": init}
    asked |= {"scheme": scheme, "tie_norms": tie_norms, "format": format, "svd": svd}
    asked |= {"device": device, "seed": seed}

    def plan(part: Part | None) -> Plan:
        with render.progress("measure") as progress:
            measuring = {"workers": writing.workers, "memory": limits["memory"]}
            return relax(source, **asked, part=part, **measuring, progress=progress)

    out = writing.output or default_output(source, f"relaxed{blocks}")
    _write(plan, out, writing, parts=format == "peft")


@writing_options
def materialize_command(tied: TIED, *, writing: Writing) -> None:
    """Write a recursive model as the stock one it came from.

    Every depth becomes a layer of its own: W + B A, added in float32 and rounded once.
    """
    make(tied, materialize, suffix="dense", writing=writing)


@writing_options
def untie_command(tied: TIED, *, writing: Writing) -> None:
    """Write a recursive model as copied layers and an adapter.

    The model goes to OUTPUT/base and the adapter to OUTPUT/adapter; peft merges it exactly, as
    it could not into shared weights. Without factors the model goes to OUTPUT itself.
    """
    writing.limits()
    source = writing.open(tied)
    out = writing.output or default_output(source, "untied")
    _write(
        lambda part: untie(source, part=part),
        out,
        writing,
        parts=any(open_tied(source).factors),
    )


def _write(
    plan: Callable[[Part | None], Plan], out: Path, writing: Writing, *, parts: bool
) -> None:
    """Write one output, or a folder with a base and an adapter."""
    if not parts:
        made = plan(None)
        write_plan(made, out, writing, in_all=_energies(made))
        return
    _check_folder(out)
    plans = {part: plan(part) for part in PARTS}
    if not writing.dry_run and not is_planning():
        _make_folder(out)
    places = {part: out / part if out.is_dir() else out for part in PARTS}  # none in a dry run
    for part, made in plans.items() if out.is_dir() else ():
        writing.check_output(made, places[part])  # before the first of them is written
    told: dict[str, Any] = {"output": str(out)}
    for part, made in plans.items():
        with redirect_stdout(StringIO()) if writing.as_json else nullcontext() as heard:
            write_plan(made, places[part], writing, in_all=_energies(made))
        if heard is not None and heard.getvalue():
            told[part] = json.loads(heard.getvalue())
    if len(told) > 1:
        render.print_json(told)


def _energies(plan: Plan) -> InAll:
    return lambda told: captured(plan, told)


def _check_folder(out: Path) -> None:
    """Refuse to put a base and an adapter among the files of something else."""
    if is_planning() or not os.path.lexists(out):
        return
    if not out.is_dir():
        raise PlanError(out, "is a file, and a base and an adapter need a folder", "choose another")
    from surgery.write import SUFFIX

    names = sorted(path.name for path in out.iterdir())
    strange = next((name for name in names if name.removesuffix(SUFFIX) not in PARTS), None)
    if strange is not None:
        fact = f"holds {strange}, which is no part of this: a base and an adapter"
        raise PlanError(out, fact, "choose another output")


def _make_folder(out: Path) -> None:
    from surgery.disk import cannot_write

    try:
        out.mkdir(exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from error
