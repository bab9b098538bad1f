"""What `surgery emr` and `surgery tall` share: stores of task masks, and models made of them."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
import typer.main

from cli.report import Told
from cli.writing import Writing, default_output, write_plan, writing_options
from merges.multitask import build_store, read_store, restore_task
from merges.multitask.store import factors_of
from surgery.checkpoint import Checkpoint
from surgery.errors import CheckpointError
from surgery.plan import Plan
from surgery.provenance import read_record

MODELS = Annotated[
    list[str], typer.Argument(metavar="MODELS...", help="Two or more models tuned from BASE.")
]
NAMES = Annotated[
    list[str] | None,
    typer.Option(
        "--name", metavar="TASK", help="Of a task; once per model.  [default: the models' names]"
    ),
]


def group(name: str, told: Callable[[], None], build: Callable[..., None]) -> Any:  # noqa: ANN401
    """Return the group of a rule: `build` of its own, and `task`."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.callback(no_args_is_help=True)(told)
    app.command("build")(build)
    app.command("task")(task_command)
    found = typer.main.get_command(app)
    found.name = name
    return found


def make_store(
    base: str,
    models: list[str],
    names: list[str] | None,
    writing: Writing,
    **rule: Any,  # noqa: ANN401 - what `build_store` takes
) -> None:
    """Write a store of task masks, and tell what each task's factor is."""
    writing.limits()
    opened = [writing.open(ref) for ref in (base, *models)]
    plan = build_store(*opened, tasks=names, **rule)
    out = writing.output or default_output(opened[0], rule["kind"]).with_suffix("")
    write_plan(plan, out, writing, in_all=lambda told: _in_all(plan, told))


def _in_all(plan: Plan, told: Told) -> dict[str, float]:
    config = plan.config or {}
    tasks: list[str] = config["tasks"]
    sizes = {n: s.numel for n, s in plan.outputs.items() if n in told}
    total = sum(sizes.values())
    found = {}
    for number, name in enumerate(tasks):
        bits = sum(figures[f"_bits {number}"] for figures in told.values())
        found[f"share of weights in the mask of {name}"] = bits / max(total, 1)
    if config["rescaler"] != "none":
        rescalers = factors_of(told, sizes, len(tasks), config["rescaler"])
        found |= {f"rescaler of {name}": f for name, f in zip(tasks, rescalers, strict=True)}
    return found


@writing_options
def task_command(
    store: Annotated[
        str, typer.Argument(metavar="STORE", help="What `surgery emr build` or `tall build` wrote.")
    ],
    task: Annotated[str, typer.Argument(metavar="TASK", help="The name of a task in it.")],
    *,
    base: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="Where the base is.  [default: where it was]"),
    ] = None,
    writing: Writing,
) -> None:
    """Make one task's model from its base and a store.

    It is an ordinary checkpoint. The base must be the one that the store was made from, in any
    files and dtype that hold its values; the run stops where it is not.
    """
    writing.limits()
    opened = writing.open(store)
    read_store(opened)
    source = writing.open(base or _recorded_base(opened))
    plan = restore_task(source, opened, task=task)
    write_plan(plan, writing.output or default_output(source, task), writing)


def _recorded_base(store: Checkpoint) -> str:
    record: Mapping[str, Any] = read_record(store) or {}
    inputs = record.get("inputs")
    if not isinstance(inputs, list) or not inputs or not isinstance(inputs[0], dict):
        raise CheckpointError(store.ref, "does not tell its base", "name it with --base")
    ref, revision = str(inputs[0].get("ref")), inputs[0].get("revision")
    return f"{ref.partition('@')[0]}@{revision}" if revision else ref
