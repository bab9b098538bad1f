"""`surgery factor`: linear maps as products of smaller ones, and back."""

from typing import Annotated, Any

import typer

from cli import render
from cli.measured import Measuring, measured, measuring_options
from cli.writing import BASE, Writing, default_output, make, write_plan, writing_options
from growth.factor.ask import Ask, check_ask
from growth.factor.dense import materialize as multiply
from growth.factor.form import Method
from growth.factor.plan import NEEDS, factor, in_all
from growth.recurse.factor import Svd
from surgery.checkpoint import Checkpoint
from surgery.errors import RecipeError
from surgery.pipeline import is_ahead
from surgery.plan import Plan

FILTERS = "a part of module names, glob:PATTERN or regex:PATTERN; several times for several."


@writing_options
@measuring_options
def command(
    base: BASE,
    *,
    method: Annotated[Method | None, typer.Option(help="What becomes of a map.")] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="Of every map, of every block with monarch; with --energy the most."),
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Share of each map's weights to keep, up to 1.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="Take the smallest ranks that keep this share of a map.")
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="Share of weights beside the product.  [default: 0.03, sparse-low-rank]"),
    ] = None,
    svd: Annotated[
        Svd | None,
        typer.Option(help="How maps are decomposed.  [default: randomized, with --energy gram]"),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help=f"Only modules by {FILTERS}")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help=f"Leave out modules by {FILTERS}")
    ] = None,
    materialize: Annotated[
        bool, typer.Option("--materialize", help="Multiply a factored model out instead.")
    ] = False,
    measuring: Measuring,
    writing: Writing,
) -> None:
    """Replace the layers' linear maps by products of smaller ones, or multiply them out again.

    svd takes the nearest map of a rank; svd-llm that whose outputs on text are nearest; monarch
    two block-diagonal factors; sparse-low-rank a product and a few weights beside it. The result
    is a factored model, which carries the code that runs it. How far each map is off is told.

    Example: surgery factor model --method svd-llm --ratio 0.6 --calibration text.jsonl
    """
    asks: dict[str, Any] = {"rank": rank, "ratio": ratio, "energy": energy, "density": density}
    asks |= {"svd": svd, "include": include or (), "exclude": exclude or ()}
    if materialize:
        if method or measuring.calibration or any(asks.values()):
            fact = "takes a factored model as it is, and no other option"
            raise RecipeError("--materialize", fact, "leave the others out")
        make(base, multiply, suffix="dense", writing=writing)
        return
    if method is None:
        known = "svd, svd-llm, monarch or sparse-low-rank"
        raise RecipeError("surgery factor", "needs --method", f"name {known}, or --materialize")
    _factor(base, method, asks, measuring, writing)


def _factor(
    base: str, method: Method, asks: dict[str, Any], measuring: Measuring, writing: Writing
) -> None:
    writing.limits()
    source = writing.open(base)
    out = writing.output or default_output(source, method)
    if method not in NEEDS and not measuring.calibration:
        write_plan(_plan(source, None, method, asks, writing), out, writing, in_all=in_all)
        return
    measuring.need(f"--method {method}")
    # A wrong ask costs no measurement; a guess takes the highest ranks where energy decides.
    light = {**asks, "energy": None}
    if asks["energy"] is not None and asks["ratio"] is None:
        check_ask(Ask(method=method, energy=asks["energy"]))
        light["rank"] = asks["rank"] or 1 << 30
    guess = factor(source, method="svd" if method in NEEDS else method, **light)
    with measured(guess, out, ["grams"], measuring=measuring, writing=writing) as statistics:
        ahead = statistics is None and is_ahead()
        plan = guess if ahead else _plan(source, statistics, method, asks, writing)
        write_plan(plan, out, writing, in_all=in_all)


def _plan(
    source: Checkpoint,
    statistics: Checkpoint | None,
    method: Method,
    asks: dict[str, Any],
    writing: Writing,
) -> Plan:
    limits: dict[str, Any] = {"workers": writing.workers, "memory": writing.limits()["memory"]}
    with render.progress("measure") as progress:
        return factor(source, statistics, method=method, **asks, **limits, progress=progress)
