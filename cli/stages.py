"""`surgery stages`: a pipeline that grows a model's depth in stages."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cli import render
from cli.stack import parse_tokens
from cli.writing import BASE
from growth.stages import Schedule, Stage, as_pipeline, plan_stages, ranges
from surgery.checkpoint import open_checkpoint
from surgery.errors import PlanError


def command(
    base: BASE,
    *,
    to: Annotated[int, typer.Option(metavar="LAYERS", help="How many layers at the end.")],
    schedule: Annotated[
        Schedule,
        typer.Option(
            help="progressive doubles the stack, gradual repeats the last block, midas the middle."
        ),
    ] = "midas",
    stages: Annotated[
        int | None,
        typer.Option(
            help="How many depths are trained, the first included.  [default: as few as fit]"
        ),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Training budget of all stages in tokens, such as 20B.")
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="Stage i is trained for a share like i^alpha (PROP-alpha).")
    ] = 1.0,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where to write the pipeline file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that stands there.")] = (
        False
    ),
) -> None:
    """Write a pipeline that grows a model's depth in stages, each a `stack` by a layer map.

    The file runs with `surgery run` as it is. Between its steps the model is to be trained; the
    shares of the tokens are told.
    """
    budget = None if tokens is None else parse_tokens(tokens)
    found = plan_stages(
        open_checkpoint(base), to=to, schedule=schedule, stages=stages, tokens=budget, alpha=alpha
    )
    text = as_pipeline(base, found, render.quantity)
    if output is not None:
        _write(output, text, force=force)
    if as_json:
        told = {"pipeline": text, "output": None if output is None else str(output)}
        render.print_json(told | {"stages": [stage.as_dict() for stage in found]})
    elif output is None:
        for line in text.splitlines():
            render.line(line)
    else:
        _show(found)
        render.line(f"{output}  surgery run {output}")


def _write(path: Path, text: str, *, force: bool) -> None:
    if path.exists() and not force:
        raise PlanError(path, "exists", "choose another name, or replace it with --force")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PlanError(path, f"cannot be written ({error.strerror})") from error


def _show(found: Sequence[Stage]) -> None:
    rows = [
        (
            stage.layers,
            ranges(stage.layer_map) if stage.layer_map else "as it is",
            f"{stage.share:.1%}",
            "" if stage.tokens is None else render.quantity(stage.tokens),
        )
        for stage in found
    ]
    render.table(("layers", "of the stage before", "share", "tokens"), rows, numbers=(0, 2, 3))
