"""`surgery transfer`: what fine-tuning changed, moved onto another base."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from cli import render
from cli.writing import Writing, default_output, write_plan, writing_options
from surgery.pipeline import is_ahead
from surgery.transfer import transfer

if TYPE_CHECKING:
    from surgery.diagnose import Diagnosis, Row


@writing_options
def command(
    *,
    old_base: Annotated[str, typer.Option(metavar="A", help="The base that B was tuned from.")],
    tuned: Annotated[str, typer.Option(metavar="B", help="The tuned model.")],
    new_base: Annotated[str, typer.Option(metavar="C", help="The base to move the change to.")],
    ratio: Annotated[float, typer.Option(help="How much of the difference to add.")] = 1.0,
    skip_embeddings: Annotated[
        bool, typer.Option("--skip-embeddings", help="Keep C's embedding and output head.")
    ] = False,
    diagnosed: Annotated[
        bool,
        typer.Option("--diagnose/--no-diagnose", help="Measure first how the bases lie."),
    ] = True,
    writing: Writing,
) -> None:
    """Move fine-tuning to another base: C + ratio * (B - A), without training.

    Before anything is written, a table tells per layer how C - A and B - A lie to one another, with
    a warning where the bases are not close; it is recorded too. Config and tokenizer are C's.
    """
    writing.limits()
    sources = [writing.open(ref) for ref in (new_base, tuned, old_base)]
    plan = transfer(*sources, ratio=ratio, skip_embeddings=skip_embeddings)
    out = writing.output or default_output(sources[0], "transfer")
    if diagnosed and not is_ahead():
        from surgery.diagnose import diagnose

        writing.check_output(plan, out)

        with render.progress("diagnose") as progress:
            found = diagnose(*sources, workers=writing.workers, progress=progress)
        if not writing.as_json:
            _show(found)
        notes = (*plan.notes, *found.warnings)
        plan = replace(plan, facts={"diagnosis": found.as_dict()}, notes=notes)
    write_plan(plan, out, writing)


def _show(found: "Diagnosis") -> None:
    columns = ("", "cos(C, A)", "cos(C-A, B-A)", "|C-A| / |B-A|", "signs against")
    rows = [_cells(row) for row in (*found.rows, found.total)]
    render.table(columns, rows, numbers=(1, 2, 3, 4))


def _cells(row: "Row") -> tuple[str, ...]:
    figures = (row.bases, row.cosine, row.ratio)
    told = ("-" if figure is None else f"{figure:.3f}" for figure in figures)
    return (row.name, *told, "-" if row.conflict is None else f"{row.conflict:.1%}")
