"""Several recipes in one file, later ones made of what earlier ones make."""

from collections.abc import Sequence
from functools import partial
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from cli.writing import Writing
from surgery.errors import RecipeError
from surgery.pipeline import Planned, Task
from surgery.pipeline.task import Paths
from surgery.recipe import Recipe, compile

LAST = "merged"  # the name of the one recipe that has none


def chained(recipes: Sequence[Recipe], writing: Writing) -> list[Task]:
    """Return a task for each recipe, in an order in which each finds what it takes.

    Raises:
        RecipeError: two recipes of one name, a name that is a path too, or a circle.
    """
    named: dict[str, Recipe] = {}
    for recipe in recipes:
        name = recipe.name or LAST
        if name in named:
            fact = f"has the name {name!r} of another" if recipe.name else "has no name, as another"
            raise RecipeError(recipe.document.place("merge_method"), fact, "give each a name")
        _check_name(recipe, name)
        named[name] = recipe
    uses = {name: [m for m in recipe.models if m in named] for name, recipe in named.items()}
    try:
        order = list(TopologicalSorter(uses).static_order())
    except CycleError as error:
        circle = " takes ".join(reversed(error.args[1]))
        raise RecipeError(recipes[0].document.source, circle, "break the circle") from error
    return [_task(name, named[name], tuple(uses[name]), writing) for name in order]


def _check_name(recipe: Recipe, name: str) -> None:
    place = recipe.document.place("name")
    if not name.isprintable() or name.startswith((".", "-")) or {"/", "\\", "=", "+"} & set(name):
        fact = f"{name!r} is no name for a result"
        raise RecipeError(place, fact, "its output gets the name: use letters, digits, - and _")
    if recipe.name and Path(name).exists():
        raise RecipeError(place, f"{name!r} is a path too", "choose another name")


def _task(name: str, recipe: Recipe, uses: tuple[str, ...], writing: Writing) -> Task:
    return Task(
        name=name,
        what=f"merge {recipe.method}",
        uses=uses,
        place=recipe.document.place("merge_method"),
        plan=partial(_plan, recipe, writing),
    )


def _plan(recipe: Recipe, writing: Writing, paths: Paths) -> Planned:
    plan = compile(recipe, open=lambda ref: writing.open(str(paths.get(ref, ref))))
    return Planned(plan=plan, limits={**writing.limits(), "fresh": not writing.resume})
