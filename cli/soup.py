"""`surgery soup`: the plain average of models, of all or of those that a greedy search keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import render
from cli.eval import models_and_texts
from cli.merge import MODELS
from cli.recipes import make_recipe
from cli.writing import Writing, default_output, is_planning, write_plan, writing_options
from surgery.errors import RecipeError
from surgery.recipe import compile, merge_models

if TYPE_CHECKING:
    from surgery.plan import Plan, TensorSpec
    from surgery.soups import Change, Greedy, HeldOut

_COLUMNS = ("model", "alone", "soup with it", "change", "95% interval", "verdict", "added")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judging:
    """The options of `--greedy`, as they were typed."""

    text: Sequence[str] = ()
    task: Sequence[str] = ()
    pairs: Sequence[str] = ()
    context: int | None = None
    batch_tokens: int = 8192
    device: str = "cpu"
    bootstrap: int = 2000
    seed: int = 0

    def need_none(self) -> None:
        """Refuse options that only a greedy soup looks at.

        Raises:
            RecipeError: one is given.
        """
        plain = _Judging()
        for each in fields(self):
            if getattr(self, each.name) != getattr(plain, each.name):
                option = f"--{each.name.replace('_', '-')}"
                fact = "is of no use without --greedy: nothing is measured"
                raise RecipeError(option, fact, "add --greedy, or drop it")

    @property
    def scoring(self) -> dict[str, Any]:
        """How to score, by the names that `greedy_soup` takes."""
        names = ("context", "batch_tokens", "device", "bootstrap", "seed")
        return {name: getattr(self, name) for name in names}


@writing_options
def command(
    models: MODELS,
    *,
    greedy: Annotated[
        bool,
        typer.Option("--greedy", help="Keep only models that make the soup better on held-out."),
    ] = False,
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Held-out text; a .jsonl line is a document."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="NAME|FILE", help="As for `surgery eval`."),
    ] = None,
    pairs: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Questions, as for `surgery eval`.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens fed at most.  [default: what all models take, up to 2048]"),
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens fed at once.")] = 8192,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")] = "cpu",
    bootstrap: Annotated[int, typer.Option(min=1, help="Draws behind each interval.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="Of the output.  [default: the models' own]")
    ] = None,
    writing: Writing,
) -> None:
    """Average models, each with the same weight (the uniform soup).

    --greedy sorts models by their own figure on held-out --text, --task or --pairs, and adds
    each to the average only if that gets better. The decisions are in surgery.json.

    For other weights: surgery merge linear.
    """
    named, more = models_and_texts(models) if text else (models, [])
    if len(named) == 1:
        raise RecipeError("soup", f"has one model, {named[0]}", "name those to average with it")
    judging = _Judging(
        text=(*(text or ()), *more),
        task=tuple(task or ()),
        pairs=tuple(pairs or ()),
        context=context,
        batch_tokens=batch_tokens,
        device=device,
        bootstrap=bootstrap,
        seed=seed,
    )
    if greedy:
        _greedy(named, judging, dtype=dtype, writing=writing)
        return
    judging.need_none()
    make_recipe(merge_models("linear", named, weight=1.0, out_dtype=dtype), writing)


def _greedy(
    models: Sequence[str], judging: _Judging, *, dtype: str | None, writing: Writing
) -> None:
    """Check everything, choose, print what was decided, and write the soup."""
    from surgery.soups.measure import HeldOut
    from surgery.soups.models import outputs_of

    if is_planning():
        fact = "measures models when it is asked for a plan, which no step of a pipeline may"
        raise RecipeError("soup --greedy", fact, "run it before, and name its output")
    if writing.weights is not None:
        fact = "is of no use to --greedy, which measures whole directories"
        raise RecipeError("--weights", fact, "drop it")
    writing.limits()
    outputs = outputs_of("soup --greedy", models, out_dtype=dtype, open_one=writing.open)
    held_out = HeldOut.read(judging.text, tasks=judging.task, pairs=judging.pairs)
    out = writing.output or default_output(writing.open(models[0]), "greedy")
    writing.check_output(_plan(models, dtype=dtype, writing=writing), out)
    if writing.dry_run:
        _show_ask(models, held_out, out, writing)
        return
    found = _chosen(models, held_out, outputs, judging, writing)
    if not writing.as_json:
        show(found)
    plan = _plan(found.chosen, dtype=dtype, writing=writing)
    write_plan(replace(plan, facts={**plan.facts, "greedy": found.as_dict()}), out, writing)


def _plan(models: Sequence[str], *, dtype: str | None, writing: Writing) -> "Plan":
    """Return the plan of the uniform soup of models, which `reproduce` repeats without text."""
    recipe = merge_models("linear", models, weight=1.0, out_dtype=dtype)
    return compile(recipe, open=writing.open)


def _chosen(
    models: Sequence[str],
    held_out: "HeldOut",
    outputs: Mapping[str, "TensorSpec"],
    judging: _Judging,
    writing: Writing,
) -> "Greedy":
    from surgery.soups.greedy import greedy_soup

    memory = writing.limits()["memory"]
    with render.progress("measure", counted=True) as progress:
        return greedy_soup(
            models, held_out, outputs, memory=memory, progress=progress, **judging.scoring
        )


def _show_ask(models: Sequence[str], held_out: "HeldOut", out: Path, writing: Writing) -> None:
    from surgery.soups.greedy import evaluations

    count = evaluations(len(models))
    told = {
        "operation": "soup --greedy",
        "output": str(out),
        "models": list(models),
        "unit": held_out.unit,
        "held_out": dict(held_out.digests),
        "evaluations": count,
    }
    if writing.as_json:
        render.print_json(told)
        return
    render.line(f"output  {out}: the average of 1 to {len(models)} models")
    soups = len(models) - 1
    render.line(f"measure {count} times: {len(models)} models and {soups} soups, {held_out.unit}")
    render.line("nothing was measured or written (--dry-run)", "dim")


def show(found: "Greedy") -> None:
    """Print the decisions in the order in which they were made."""
    rows = [
        (
            each.name,
            f"{each.alone:.4f}",
            f"{each.soup:.4f}",
            *change_cells(each.change),
            "yes" if each.added else "no",
        )
        for each in found.decisions
    ]
    render.table(_COLUMNS, rows, numbers=(1, 2, 3, 4))
    kept, tried = len(found.chosen), len(found.decisions)
    render.line(f"{found.unit} over {found.documents} documents; {kept} of {tried} models kept")
    note = "the documents chose the soup, so its figure on them flatters it: measure it on others"
    render.line(note, "dim")


def change_cells(change: "Change | None") -> tuple[str, str, str]:
    """Return a change, its interval and its verdict as cells."""
    if change is None:
        return "", "", ""
    has = change.low is not None and change.high is not None
    interval = f"{change.low:+.4f} {change.high:+.4f}" if has else ""
    return f"{change.figure:+.4f}", interval, change.verdict
