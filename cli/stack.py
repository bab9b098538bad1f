"""`surgery stack`: repeat layers."""

from typing import Annotated, Any

import typer

from cli import render
from cli.writing import BASE, Writing, make, writing_options
from growth.stack import RECIPE, Advice, Order, advise, stack
from surgery.anatomy import anatomy
from surgery.checkpoint import Checkpoint
from surgery.errors import RecipeError


@writing_options
def command(
    base: BASE,
    *,
    factor: Annotated[
        int | None, typer.Option(help="G copies of the whole stack of layers (G_stack).")
    ] = None,
    order: Annotated[
        Order | None,
        typer.Option(help="abab repeats the whole stack (the default), aabb each layer in place."),
    ] = None,
    dus: Annotated[
        int | None,
        typer.Option(metavar="M", help="Depth up-scaling: layers 0..L-M-1, then M..L-1 (SOLAR)."),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option("--map", metavar="RANGES", help='Any layer map, such as "0-23,8-31".'),
    ] = None,
    scale: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[LAYERS:][NAME=]FACTOR",
            help="Scale tensors of new layers; by default the output projections of repeats.",
        ),
    ] = None,
    advice: Annotated[
        bool, typer.Option("--advise", help="Print when to grow this model, and write nothing.")
    ] = False,
    tokens: Annotated[
        str | None, typer.Option(help="Training budget in tokens for --advise, such as 2T.")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Tell the paper's training recipe too.")
    ] = False,
    writing: Writing,
) -> None:
    """Repeat layers: G_stack, depth up-scaling, or any explicit layer map.

    Bytes are copied, never computed; per-layer entries of the config move with their layers.
    The result does not compute what BASE does: train it on.
    """
    if verbose:
        render.remark(RECIPE)
    asked = {"factor": factor, "order": order, "dus": dus, "layers": layers}
    if advice:
        if order or layers or scale or dus is not None or writing.output:
            raise RecipeError("--advise", "goes with --factor and --tokens only", "drop the rest")
        _print_advice(
            _advice(writing.open(base), tokens, 4 if factor is None else factor),
            as_json=writing.as_json,
        )
        return
    if tokens is not None:
        raise RecipeError("--tokens", "says nothing without --advise", "add --advise")
    make(
        base,
        lambda source: stack(source, scale=scale or (), **asked),  # type: ignore[arg-type]
        suffix=f"stack{factor}" if factor else "dus" if dus is not None else "stack",
        writing=writing,
    )


def _advice(base: Checkpoint, tokens: str | None, factor: int) -> Advice:
    if tokens is None:
        raise RecipeError("--advise", "needs the training budget", "add --tokens, such as 2T")
    if factor < 1:
        raise RecipeError(f"--factor {factor}", "is below 1", "the paper found 4 best")
    parts = anatomy(base)
    total = sum(t.numel for t in base.tensors.values())
    layers = sum(t.numel for n, t in base.tensors.items() if parts.locate(n) is not None)
    grown = total + layers * (factor - 1)
    return advise(base_parameters=total, grown_parameters=grown, tokens=parse_tokens(tokens))


def parse_tokens(text: str) -> float:
    """Read a number of tokens such as 300B."""
    units = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in units else (text, "")
    try:
        return float(number) * units.get(unit, 1.0)
    except ValueError as error:
        raise RecipeError(f"--tokens {text}", "is not a number", "write 300B or 2T") from error


def _print_advice(found: Advice, *, as_json: bool) -> None:
    if as_json:
        render.print_json(found.as_dict())
        return
    rows: list[tuple[str, Any]] = [
        ("parameters of the base", render.quantity(found.base_parameters)),
        ("parameters after stacking (N)", render.quantity(found.grown_parameters)),
        ("training budget in tokens (D)", render.quantity(found.tokens)),
        ("training FLOPs (C = 6 N D)", f"{found.flops:.3g}"),
        ("train the base for (d tokens)", render.quantity(found.growth_tokens)),
        ("share of the budget", f"{found.growth_tokens / found.tokens:.2%}"),
        ("growth factor the paper found best", found.factor),
    ]
    render.table(("G_stack growth timing", ""), rows, numbers=(1,))
    base, rest = (
        render.quantity(n) for n in (found.growth_tokens, found.tokens - found.growth_tokens)
    )
    if found.pays:
        render.line(f"For this model: train it for {base} tokens in all, stack, train {rest} more.")
    else:
        render.line(
            f"For this model: the rule wants {base} tokens before stacking, more than the "
            "budget: do not stack."
        )
    render.line(
        "The rule was fitted on models of 0.4 B to 3 B parameters; far from there it is a guess.",
        "dim",
    )
    render.line("log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74 (arXiv 2405.15319)", "dim")
