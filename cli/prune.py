"""`surgery prune`: drop layers, by number or by what they do."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from cli import render
from cli.measured import Measuring, measured, measuring_options
from cli.writing import BASE, Writing, default_output, make, write_plan, writing_options
from growth.prune import choose_layers, prune
from surgery.anatomy import anatomy
from surgery.checkpoint import Checkpoint
from surgery.errors import RecipeError

THRESHOLD = 0.45
Method = Literal["block-influence", "angular", "similarity", "tail", "laco"]


@writing_options
@measuring_options
def command(
    base: BASE,
    *,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="RANGES|N",
            help='The layers to drop, such as "21-28"; with --method, how many.',
        ),
    ] = None,
    method: Annotated[
        Method | None, typer.Option(help="Choose the layers by what they do.")
    ] = None,
    width: Annotated[
        str | None,
        typer.Option(
            metavar="SIZES",
            help="Cut units instead of layers, to sizes such as ffn=4096,heads=16,kv-heads=4 or "
            "hidden=1536.",
        ),
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="laco: how alike the output has to stay, as a cosine.")
    ] = THRESHOLD,
    measuring: Measuring,
    writing: Writing,
) -> None:
    """Drop layers by number or by what they do, or units of every layer by what they do.

    block-influence drops the layers that turn the residual stream least, wherever they are;
    angular and similarity the run of layers whose input and output are most alike (at the last
    token, over all tokens); tail the last ones; laco melts runs of layers into one, as long as
    the model's output stays alike. The others close up.

    --width keeps the feed-forward units, heads and channels that are most active on text
    (Minitron), as many in every layer, so that the stock class loads the result. What a cut
    costs: `surgery eval`.
    """
    if (layers is None) == (width is None) or (width is not None and method is not None):
        fact = "needs either --layers, with or without --method, or --width"
        raise RecipeError("surgery prune", fact, "for instance --layers 21-28")
    if threshold != THRESHOLD and method != "laco":
        raise RecipeError("--threshold", "is for --method laco", "drop it")
    if width is not None:
        _narrow(base, width, measuring=measuring, writing=writing)
        return
    assert layers is not None  # noqa: S101 - one of both is
    if method is None:
        measuring.need_none("--layers without --method")
        make(base, lambda source: prune(source, layers=layers), suffix="prune", writing=writing)
        return
    writing.limits()
    count = _count(layers)
    source = writing.open(base)
    out = writing.output or default_output(source, f"prune{count}")
    if method == "laco":
        _melt(source, out, count, threshold=threshold, measuring=measuring, writing=writing)
        return
    tail, _ = choose_layers(source, None, method="tail", layers=count)
    guess = prune(source, layers=_listed(tail), method="tail", scores=[])
    if method == "tail":
        measuring.need_none("--method tail")
        write_plan(guess, out, writing)
        return
    measuring.need(f"--method {method}")
    with measured(guess, out, ["layers"], measuring=measuring, writing=writing) as statistics:
        gone, scores = choose_layers(source, statistics, method=method, layers=count)
        plan = prune(source, layers=_listed(gone), method=method, scores=scores)
        write_plan(plan, out, writing)


def _listed(layers: Sequence[int]) -> str:
    return ",".join(map(str, layers))


def _narrow(base: str, width: str, *, measuring: Measuring, writing: Writing) -> None:
    from growth.cutting import parse_widths
    from growth.narrow import narrow

    writing.limits()
    parse_widths(width)
    source = writing.open(base)
    out = writing.output or default_output(source, "narrow")
    guess = narrow(source, None, width=width)  # a wrong ask costs no measurement
    measuring.need("--width")
    with measured(guess, out, ["inputs"], measuring=measuring, writing=writing) as statistics:
        write_plan(narrow(source, statistics, width=width), out, writing)


def _melt(
    source: Checkpoint,
    out: Path,
    count: int,
    *,
    threshold: float,
    measuring: Measuring,
    writing: Writing,
) -> None:
    from growth.laco import Ask, check_ask, collapse, find_collapse
    from surgery.pipeline import is_ahead

    check_ask(source, layers=count, threshold=threshold)
    measuring.need("--method laco")
    if not measuring.texts:
        fact = "runs the model again and again, so it needs text, not statistics"
        raise RecipeError("--method laco", fact, "name a text file: --calibration FILE")
    if measuring.statistics is not None:
        raise RecipeError(
            "--statistics", "is of no use to --method laco, which keeps none", "drop it"
        )
    left = [{str(n): 1} for n in range(anatomy(source).layers - count)]
    guess = collapse(source, mixtures=left, threshold=threshold)  # of the same size
    if is_ahead():
        write_plan(guess, out, writing)
        return
    writing.check_output(guess, out)
    ask = Ask(context=measuring.context, samples=measuring.samples, device=measuring.device)
    with render.progress(f"laco {source.name}", counted=True) as progress:
        mixtures = find_collapse(
            source, measuring.texts, layers=count, threshold=threshold, ask=ask, progress=progress
        )
    if not writing.as_json:
        render.remark(f"layers become {', '.join(map(_sum_of, mixtures))}")
    rows = [{str(layer): times for layer, times in row.items()} for row in mixtures]
    write_plan(collapse(source, mixtures=rows, threshold=threshold), out, writing)


def _sum_of(mixture: Mapping[int, int]) -> str:
    terms = [
        f"{times:+d}*{layer}" if times != 1 else f"+{layer}" for layer, times in mixture.items()
    ]
    return "".join(terms).removeprefix("+")


def _count(text: str) -> int:
    if not text.strip().isdecimal() or len(text) > 5:  # noqa: PLR2004 - no model has more layers
        fact = f"{text[:40]!r} is not a number of layers, which --method asks for"
        raise RecipeError("--layers", fact, "for instance --layers 4")
    return int(text)
