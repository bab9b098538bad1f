"""`surgery align`: put a model's units where another model has like ones."""

from typing import Annotated

import typer

from cli import render
from cli.writing import Writing, default_output, write_plan, writing_options
from surgery.alignment import align

MODEL = Annotated[str, typer.Argument(metavar="MODEL", help="The model whose units are moved.")]


@writing_options
def command(
    reference: Annotated[
        str, typer.Argument(metavar="REFERENCE", help="A model of the same architecture.")
    ],
    model: MODEL,
    *,
    writing: Writing,
) -> None:
    """Move hidden units, heads and experts of MODEL to where REFERENCE has like ones.

    The output computes what MODEL computes. Both are compared before anything is planned.
    """
    memory = writing.limits()["memory"]
    other, source = writing.open(reference), writing.open(model)
    with render.progress(f"compare {source.name}") as progress:
        plan = align(source, other, memory=memory, progress=progress)
    write_plan(plan, writing.output or default_output(source, "aligned"), writing)
    if not writing.as_json:
        _show(plan.facts["groups"])


def _show(groups: dict[str, dict[str, float]]) -> None:
    rows = [
        (name, g["moved"], g["units"], f"{g['cosine_before']:.4f}", f"{g['cosine_after']:.4f}")
        for name, g in groups.items()
    ]
    headings = ("units of", "moved", "of", "cosine before", "after")
    render.table(headings, rows, numbers=(1, 2, 3, 4))
