"""`surgery verify`: is it whole, does it load, does it match its record."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import render
from surgery.checkpoint.adapter_source import open_any
from surgery.errors import CheckpointError, VerificationError

if TYPE_CHECKING:
    from surgery.verify import Check

SHOWN = 20  # problems of one check; --json has all
STYLES = {"ok": "green", "failed": "red", "skipped": "yellow"}


def command(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="A directory, a .safetensors file, or org/name[@rev]."),
    ],
    *,
    load: Annotated[
        bool, typer.Option("--load/--no-load", help="Ask transformers whether it loads it whole.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, max=256, help="Threads.  [default: by cores]")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="The weight or index file to take, where there are several.")
    ] = None,
) -> None:
    """Check that a checkpoint is whole, agrees with its config, loads, and matches its record.

    Reads every byte once. Exit code 3 when a check fails.
    """
    from surgery.verify import unsound, verify

    try:
        checkpoint = open_any(path, weights=weights)
    except CheckpointError as error:
        if not os.path.lexists(Path(path).expanduser()):
            raise
        checks = [unsound(error)]
    else:
        with render.progress(f"verify {Path(path).name}") as progress:
            checks = verify(checkpoint, load=load, workers=workers, progress=progress)
    problems = [problem for check in checks for problem in check.problems]
    if as_json:
        told = {"path": path, "ok": not problems, "checks": [asdict(check) for check in checks]}
        render.print_json(told)
    else:
        _show(checks)
    if problems:
        first = _inside(path, problems[0])
        more = "" if len(problems) == 1 else f"{len(problems)} problems, the first: "
        raise VerificationError(path, more + first)


def _inside(path: str, problem: str) -> str:
    """Leave the checkpoint's own path, which is told already, out of a problem's place."""
    return problem.removeprefix(f"{path}: ").removeprefix(f"{path.rstrip('/')}/")


def _show(checks: Sequence["Check"]) -> None:
    for check in checks:
        render.line(f"{check.status:8}{check.name:9}{check.detail}", STYLES[check.status])
        for problem in check.problems[:SHOWN]:
            render.line(f"        {problem}")
        more = len(check.problems) - SHOWN
        if more > 0:
            render.line(f"        and {more} more (--json lists all)")
