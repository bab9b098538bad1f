"""`surgery moe`: dense models as the experts of one mixture."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import render
from cli.upcycle import LAYERS, LAYOUT, ROUTER_STD, TOP_K
from cli.writing import Writing, default_output, is_planning, write_plan, writing_options
from growth.upcycle import ROUTER_DEVIATION
from growth.upcycle.moe import Attention, Gate, moe
from growth.upcycle.routers import told_gate
from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.errors import PlanError, RecipeError

if TYPE_CHECKING:
    from growth.upcycle.gates import Tokens
else:
    from typing import Literal

    Tokens = Literal["mean", "last"]


@writing_options
def command(
    experts: Annotated[
        list[str],
        typer.Argument(metavar="EXPERTS...", help="Dense models of one architecture."),
    ],
    *,
    gate: Annotated[
        Gate, typer.Option(help="Where the routers come from: prompts, or chance.")
    ] = "hidden",
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML or JSON: {expert: {positive: [], negative: []}}."),
    ] = None,
    gates: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Measured routers: read if there, else written.  [default: beside the output]",
        ),
    ] = None,
    tokens: Annotated[
        Tokens, typer.Option(help="Which tokens of a prompt --gate hidden takes.")
    ] = "mean",
    attention: Annotated[
        Attention, typer.Option(help="What all but the experts becomes.")
    ] = "average",
    top_k: TOP_K = 2,
    layout: LAYOUT = None,
    layers: LAYERS = None,
    router_std: ROUTER_STD = ROUTER_DEVIATION,
    seed: Annotated[int, typer.Option(help="Seed of random routers.")] = 0,
    device: Annotated[
        str, typer.Option(help="Where --gate hidden computes: cpu, cuda, cuda:1, ...")
    ] = "cpu",
    writing: Writing,
) -> None:
    """Make dense models the experts of one mixture, what else they hold averaged (BTX).

    --gate hidden runs the model over each expert's prompts and takes what each layer's router
    would see; --gate cheap takes the embeddings of their tokens. Both are measured once into a
    small file that the record names. The result is meant to be trained.
    """
    writing.limits()
    opened = [writing.open(ref) for ref in experts]
    out = writing.output or default_output(opened[0], "moe")
    asked: dict[str, Any] = {
        "attention": attention,
        "top_k": top_k,
        "layout": layout,
        "layers": layers,
        "router_std": router_std,
        "seed": seed,
    }
    plan = moe(*opened, gate="random", **asked)  # what it refuses is told before any measurement
    if gate == "random":
        _refuse_unused(prompts, gates)
        write_plan(plan, out, writing)
        return
    writing.check_output(plan, out)
    question = _question(opened, prompts, gate=gate, tokens=tokens, attention=attention)
    question["layers"] = plan.facts["mixture_layers"]
    with _place(gates, out, writing) as file:
        _check_reused(file, question, prompts)
        if not file.exists():
            with render.progress(f"measure {gate} gates"):
                _measure(file, opened, prompts, question, device=device, beside=out.parent)
        rows = open_checkpoint(file)
        write_plan(moe(*opened, rows, gate=gate, **asked), out, writing)


def _refuse_unused(prompts: Path | None, gates: Path | None) -> None:
    for option, given in (("--prompts", prompts), ("--gates", gates)):
        if given is not None:
            fact = "says nothing beside --gate random"
            raise RecipeError(f"{option} {given}", fact, "leave it out, or give another gate")


def _question(
    experts: Sequence[Checkpoint],
    prompts: Path | None,
    *,
    gate: Gate,
    tokens: str,
    attention: str,
) -> dict[str, Any]:
    """Return what decides the rows: two measurements of one question give the same."""
    is_there = prompts is not None and prompts.is_file()
    asked = hashlib.sha256(prompts.read_bytes()).hexdigest() if prompts and is_there else None
    models = [[each.ref, [list(s)[2:] for s in each.stamps.values()]] for each in experts]
    return {
        "gate": gate,
        "tokens": tokens if gate == "hidden" else None,
        "prompts": asked,
        "models": models,
        "attention": attention,
    }


@contextmanager
def _place(gates: Path | None, out: Path, writing: Writing) -> Iterator[Path]:
    """Give the file of rows: where it was asked for, or beside the output; a dry run keeps none."""
    if is_planning() and not (gates and gates.is_file()):
        fact = "is measured from prompts, which a pipeline does not do"
        raise RecipeError("--gate", fact, "measure first with surgery moe, and name its --gates")
    file = gates or out.with_name(f"{out.name}.gates.safetensors")
    if writing.dry_run and not file.exists():
        with TemporaryDirectory(prefix="surgery-") as folder:
            yield Path(folder) / file.name
        return
    yield file


def _check_reused(file: Path, question: dict[str, Any], prompts: Path | None) -> None:
    """Refuse a file of rows that answers another question, and a measurement without prompts."""
    if not file.exists():
        if prompts is None:
            fact = "needs prompts that tell what each expert is for"
            raise RecipeError(f"--gate {question['gate']}", fact, "give --prompts FILE")
        return
    told = dict(told_gate(open_checkpoint(file)).question)
    if prompts is None:  # whoever names a file alone takes its prompts
        told["prompts"] = None
    if told != question:
        key = next((key for key in question if told.get(key) != question[key]), "models")
        fact = f"holds routers measured otherwise ({key} differ)"
        raise PlanError(file, fact, "remove it, or name another file with --gates")


def _measure(
    file: Path,
    experts: Sequence[Checkpoint],
    prompts: Path | None,
    question: dict[str, Any],
    *,
    device: str,
    beside: Path,
) -> None:
    from growth.upcycle import gates
    from growth.upcycle.prompts import read_prompts

    assert prompts is not None  # noqa: S101 - checked before
    named = read_prompts(prompts, [(each.name, each.ref) for each in experts])
    kept = list(experts) if question["attention"] == "average" else [experts[0]]
    given = {"layers": question["layers"], "question": question}
    if question["gate"] == "cheap":
        with gates.cheap_vectors(kept) as vector:
            gates.write_rows(file, vector, named, **given)
    elif len(kept) == 1:
        with gates.hidden_vectors(kept[0].ref, tokens=question["tokens"], device=device) as vector:
            gates.write_rows(file, vector, named, **given)
    else:
        with (
            gates.averaged(kept, beside=beside) as ref,
            gates.hidden_vectors(ref, tokens=question["tokens"], device=device) as vector,
        ):
            gates.write_rows(file, vector, named, **given)
