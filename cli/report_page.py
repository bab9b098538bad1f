"""`surgery report`: evaluations, recoveries and records on one page."""

from pathlib import Path
from typing import Annotated

import typer

from cli import render
from surgery.errors import RecipeError

RUN = "A run.json of `surgery eval -o`, a checkpoint with a surgery.json, or an OUT.surgery-run."


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help=RUN)],
    *,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write the page here."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what was read as one JSON object.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE of -o.")] = False,
) -> None:
    """Show evaluations, recoveries and lineage on one web page that needs no network.

    Sections without data are left out.

    Example: surgery report run.json healed healed.surgery-run -o report.html
    """
    if output is None and not as_json:
        raise RecipeError("surgery report", "has nowhere to put the page", "add -o report.html")
    if output is not None:
        _check(output, runs, force=force)
    from surgery.report import read_all, report_page

    found = read_all(runs)
    if output is not None:
        from surgery.report_page import write_page

        write_page(report_page(found), output)
        render.remark(f"wrote {output}")
    if as_json:
        render.print_json(found.as_dict())


def _check(output: Path, runs: list[Path], *, force: bool) -> None:
    """Make sure that the page can be drawn and written, before anything is read."""
    from surgery.charts import require_plotly
    from surgery.report_page import check_page

    require_plotly("-o")
    check_page(output, force=force, inputs=[run for run in runs if run.is_file()])
