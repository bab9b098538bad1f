"""What every command that carries out a recipe shares: its options, its explanation."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cli import render
from cli.writing import Writing, default_output, write_plan
from surgery.recipe import Compiled, Recipe, compile_recipe, explain

# Name: annotation and default, for commands whose signature is made from a method's.
MERGING: dict[str, tuple[Any, Any]] = {
    "out_dtype": (
        Annotated[
            str | None,
            typer.Option("--dtype", help="Of the output.  [default: the models' own]"),
        ],
        None,
    ),
    "seed": (Annotated[int, typer.Option(min=0, help="Seed of random masks.")], 0),
    "tokenizer": (
        Annotated[
            str | None,
            typer.Option(metavar="union|base|MODEL", help="Whose vocabulary the output has."),
        ],
        None,
    ),
    "chat_template": (
        Annotated[
            str | None,
            typer.Option(metavar="auto|NAME|TEXT", help="The output's chat template."),
        ],
        None,
    ),
    "match_experts": (
        Annotated[
            bool,
            typer.Option("--match-experts", help="Put experts where the base has like ones."),
        ],
        False,
    ),
    "explain": (
        Annotated[
            bool,
            typer.Option("--explain", help="Print each tensor's numbers and why, write nothing."),
        ],
        False,
    ),
}


def make_recipe(
    recipe: Recipe,
    writing: Writing,
    *,
    explain: bool = False,
    out: Path | None = None,
    file: Path | None = None,
) -> None:
    """Compile a recipe, and explain, describe or run it, by the options.

    Args:
        out: where to write, whatever the options say.
        file: where the recipe stands; without -o, the output is named after it, in the working
            directory.
    """
    writing.limits()  # an error in them is told before anything is opened
    compiled = compile_recipe(recipe, open_one=writing.open)
    if explain:
        _print_explained(compiled, as_json=writing.as_json)
        return
    plan = compiled.plan
    out = out or writing.output
    if out is None and file is not None:
        out = Path(file.stem + (".safetensors" if plan.bare else ""))
    named = recipe.name or recipe.method
    write_plan(plan, out or default_output(plan.sources[0], named), writing)


def _print_explained(compiled: Compiled, *, as_json: bool) -> None:
    rows = explain(compiled)
    if as_json:
        render.print_json({"explain": [row.as_dict() for row in rows]})
        return
    headings = ("tensor", "parameter", "model", "value", "why")
    render.table(headings, [(r.tensor, r.parameter, r.model, r.shown, r.why) for r in rows])
    for note in compiled.plan.notes:
        render.line(f"note    {note}")
    render.line("nothing was written (--explain)", "dim")
