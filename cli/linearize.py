"""`surgery linearize`: softmax attention to linear attention."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli import render
from cli.linearize_tables import show_ask, show_outcome
from cli.writing import Writing, is_planning, parse_size, write_plan
from surgery.errors import Exit, RecipeError
from surgery.linearize.ask import Ask, Kd, Training, check_ask, parse_stages
from surgery.linearize.published import FULL_RATE, KD_RATE, RECIPES
from surgery.linearize.transfer_ask import FEATURES, LEARNING_RATES
from surgery.recover.settings import Precision
from surgery.recover.sources import Source

if TYPE_CHECKING:
    from surgery.linearize.stages import Watch

Name = Literal[
    "lolcats", "hedgehog", "t2r", "liger", "lizard", "gla", "gated-delta", "based", "swa-sink"
]
LOLCATS = RECIPES["lolcats"]


def _others(default: float, told: Mapping[str, float]) -> str:
    """Write a default, and the methods that have another."""
    more = (f"{name} {value:g}" for name, value in told.items() if value != default)
    return "; ".join([f"{default:g}", *([", ".join(more)] if told else [])])


TRAINED = {name: recipe for name, recipe in RECIPES.items() if recipe.stages}
TRANSFER_RATES = _others(FEATURES, LEARNING_RATES)
RATES = _others(LOLCATS.lr, {name: recipe.lr for name, recipe in TRAINED.items()})
CONTEXTS = _others(LOLCATS.context, {name: recipe.context for name, recipe in TRAINED.items()})


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="With softmax attention.")],
    *,
    method: Annotated[Name, typer.Option(help="What stands for softmax attention.")],
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Text to train on, as recover takes it; repeatable."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Where to write.  [default: MODEL-METHOD]"),
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(
            help="none, or some of transfer, lora, full, kd in that order.  [default: "
            "transfer,lora; liger lora; swa-sink none]"
        ),
    ] = None,
    keep_softmax: Annotated[
        str | None,
        typer.Option(
            metavar="LAYERS",
            help="Layers that keep it: every:4, 3,7,11, or kl:N, the N that cost most.",
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(help="Tokens seen exactly.  [default: 64; lizard 128]"),
    ] = None,
    sinks: Annotated[
        int | None, typer.Option(help="First tokens that stay in sight.  [default: 4]")
    ] = None,
    feature_dim: Annotated[int | None, typer.Option(help="Width of feature maps.")] = None,
    feature_map: Annotated[
        str | None, typer.Option(help="softmax or exp; lolcats, hedgehog, lizard.")
    ] = None,
    sliding: Annotated[
        Literal["keep", "convert"], typer.Option(help="Layers that slide in MODEL.")
    ] = "keep",
    transfer_tokens: Annotated[str, typer.Option(help="Of the transfer stage.")] = "20M",
    tokens: Annotated[str, typer.Option(help="Of lora or full.")] = "20M",
    kd_tokens: Annotated[str, typer.Option(help="Of kd.")] = "20M",
    transfer_lr: Annotated[
        float | None, typer.Option(help=f"Peak.  [default: {TRANSFER_RATES}]")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(help=f"Peak of lora or full.  [default: {RATES}; full {FULL_RATE:g}]"),
    ] = None,
    kd_lr: Annotated[float, typer.Option(help="Peak of kd.")] = KD_RATE,
    context: Annotated[
        int | None,
        typer.Option(help=f"Tokens of a row.  [default: {CONTEXTS}; or what MODEL reads]"),
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a step.  [default: 8 rows; gla, gated-delta 32]")
    ] = None,
    micro_tokens: Annotated[int, typer.Option(help="Tokens fed at once.")] = 8192,
    rank: Annotated[int | None, typer.Option(help="Of LoRA.  [default: 8]")] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(help="Of LoRA.  [default: twice the rank; liger the rank]")
    ] = None,
    train: Annotated[Kd, typer.Option(help="What kd trains.")] = "full",
    attention_weight: Annotated[
        float, typer.Option(help="Of the cross-entropy of attention weights in transfer.")
    ] = 0.0,
    blocks: Annotated[
        int | None,
        typer.Option(metavar="K", help="Transfer K layers at a time, hidden states on disk."),
    ] = None,
    held_out: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Text that is only measured; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of orders and initialisations.")] = 0,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")] = "cpu",
    precision: Annotated[
        Precision | None, typer.Option(help="[default: float32 on cpu, bfloat16 elsewhere]")
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute layers: less memory, more time.")
    ] = False,
    save_steps: Annotated[int, typer.Option(help="Save every so many steps; 0 by time alone.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on with a stage that was interrupted.")
    ] = True,
    keep_stages: Annotated[
        bool, typer.Option("--keep-stages", help="Keep the models between the stages.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a model that stands at the output.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, do nothing.")] = False,
    memory: Annotated[str, typer.Option(help="Memory to hold while writing.")] = "1G",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Give layers linear attention: convert, train what is new, recover, and measure the cost.

    transfer teaches each layer the output of its softmax attention; lora or full then train on
    the text, and kd on MODEL's answers. With --held-out all of it is measured beside MODEL and a
    sliding window with sinks (swa-sink), which takes no training and is often hard to beat: look
    at that row, and at the one without the linear branch. The stages run in OUTPUT.surgery-run;
    the same command goes on after an interrupt.

    Example: surgery linearize model --method lolcats --data text.jsonl --held-out new.jsonl -o fast
    """
    stages = parse_stages(stage, method)
    training = Training(
        tokens=_tokens("--tokens", tokens),
        transfer_tokens=_tokens("--transfer-tokens", transfer_tokens),
        kd_tokens=_tokens("--kd-tokens", kd_tokens),
        lr=lr,
        transfer_lr=transfer_lr,
        kd_lr=kd_lr,
        context=context,
        batch_tokens=batch_tokens,
        micro_tokens=micro_tokens,
        rank=rank,
        lora_alpha=lora_alpha,
        kd=train,
        attention_weight=attention_weight,
        blocks=blocks,
        precision=precision,
        checkpointing=checkpointing,
        save_steps=save_steps,
    )
    options: dict[str, Any] = {"window": window, "sinks": sinks, "feature_dim": feature_dim}
    ask = Ask(
        model=model,
        out=output or Path(f"{model.rstrip('/').rpartition('/')[2]}-{method}"),
        method=method,
        stages=stages,
        data=tuple(Source(path) for path in data or ()),
        keep_softmax=keep_softmax,
        options={**options, "feature_map": feature_map, "sliding": sliding},
        training=training,
        held_out=tuple(held_out or ()),
        device=device,
        seed=seed,
        resume=resume,
        keep_stages=keep_stages,
    )
    writing = Writing(
        output=output, dry_run=dry_run, as_json=as_json, force=force, resume=resume, memory=memory
    )
    _carry_out(ask, writing)


def _carry_out(ask: Ask, writing: Writing) -> None:
    limits = {"memory": parse_size(writing.memory, "--memory")}
    plan = check_ask(ask, force=writing.force or is_planning())
    alone = not ask.stages and not ask.held_out
    if alone and not writing.dry_run:
        write_plan(plan, ask.out, writing)
        return
    if is_planning():
        remedy = "convert by --stage none, and train in steps of their own"
        raise RecipeError("linearize", "trains in stages, which a pipeline does not run", remedy)
    if writing.dry_run:
        show_ask(ask, plan, as_json=writing.as_json)
        return
    from surgery.linearize.stages import linearize_in_stages

    with _watch() as watch:
        found = linearize_in_stages(ask, force=writing.force, watch=watch, **limits)
    if found.out is None:
        render.remark(
            f"stopped in {found.stopped}, saved in {ask.folder}; the same command goes on"
        )
        raise typer.Exit(int(Exit.INTERRUPTED))
    show_outcome(found, ask, as_json=writing.as_json)


@contextmanager
def _watch() -> "Iterator[Watch]":
    """Draw one live line on stderr where somebody looks; the stages' names where nobody does."""
    from surgery.linearize.stages import Watch

    if not render.is_watched(stderr=True):
        yield Watch(remark=render.remark, stage=lambda name: render.remark(f"stage: {name}"))
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Left

    columns = (TextColumn("{task.fields[stage]}"), BarColumn(), MofNCompleteColumn())
    live = (*columns, TextColumn("{task.description}"), Left())
    with Progress(*live, console=render.err(), transient=True) as bar:
        task = bar.add_task("", total=None, stage="")

        def training(told: Mapping[str, Any]) -> None:
            parts = [f"loss {told['loss']:.4f}"]
            parts += [f"lr {told['lr']:.2g}"] if "lr" in told else []
            speed = told.get("tokens_per_second")
            parts += [f"{speed:,.0f} tokens/s"] if speed else []
            text = "  ".join(parts)
            bar.update(task, completed=told["step"] + 1, total=told["steps"], description=text)

        def measuring(name: str, fed: int, total: int) -> None:
            bar.update(task, completed=fed, total=total, description=name)

        yield Watch(
            stage=lambda name: bar.reset(task, total=None, description="", stage=name),
            training=training,
            measuring=measuring,
            remark=render.remark,
        )


def _tokens(option: str, text: str) -> int:
    from cli.stack import parse_tokens

    found = parse_tokens(text)
    if not 1 <= found < float("1e18"):
        raise RecipeError(f"{option} {text}", "is not a number of tokens", "for instance 10M")
    return int(found)
