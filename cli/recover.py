"""`surgery recover`: heal a model after surgery."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import render
from cli.recovering import live_line, show_ask
from cli.writing import parse_size
from surgery.checkpoint import open_checkpoint
from surgery.errors import Exit, RecipeError
from surgery.recover.ask import Ask, check_ask
from surgery.recover.settings import (
    LEARNING_RATES,
    Kernels,
    Optimizer,
    Precision,
    Schedule,
    Selecting,
    Settings,
    Train,
    default_context,
    parse_losses,
)
from surgery.recover.sources import Source

if TYPE_CHECKING:
    from surgery.recover.run import Recovery

MOST_TOKENS = 1e18
RATES = ", ".join(f"{name} {rate:g}" for name, rate in LEARNING_RATES.items())


def command(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="The model to heal.")],
    *,
    data: Annotated[
        list[str],
        typer.Option(
            metavar="FILE",
            help="Text, .jsonl (text, or chats under `messages`), .parquet, or "
            "hf://datasets/OWNER/NAME; repeatable.",
        ),
    ],
    teacher: Annotated[
        str | None, typer.Option(metavar="PARENT", help="The model whose answers it is to give.")
    ] = None,
    teacher_cache: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Its answers, kept by `surgery teacher cache`."),
    ] = None,
    correct_teacher: Annotated[
        str | None,
        typer.Option(metavar="TOKENS", help="Train the teacher on so much of the data first."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Where to write.  [default: STUDENT-healed]"),
    ] = None,
    train: Annotated[
        Train,
        typer.Option(
            help="lora: on all linear layers, and norms; norms: norms and biases; new: the layers "
            "that the student's record calls new; half: a random half of the matrices."
        ),
    ] = "lora",
    rank: Annotated[int, typer.Option(help="Of LoRA.")] = 64,
    lora_alpha: Annotated[float | None, typer.Option(help="Of LoRA.  [default: the rank]")] = None,
    lora_init: Annotated[
        str, typer.Option(help="default, pissa, corda, eva, olora, orthogonal, loftq.")
    ] = "default",
    include: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only modules with this in their name.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Leave out such modules.")
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=W,...",
            help="ce, kl, rkl, jsd, tvd, hidden_mse, hidden_cos, early_exit.  "
            "[default: kl=1 with a teacher, else ce=1]",
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of losses on logits.")] = 1.0,
    tokens: Annotated[str, typer.Option(help="To train on, such as 10M.")] = "10M",
    context: Annotated[
        int | None,
        typer.Option(help="Tokens of a row.  [default: what the model takes, up to 2048]"),
    ] = None,
    batch_tokens: Annotated[
        int, typer.Option(help="Tokens of a step, over all processes.")
    ] = 65536,
    micro_tokens: Annotated[int, typer.Option(help="Tokens a process feeds at once.")] = 8192,
    lr: Annotated[float | None, typer.Option(help=f"Peak.  [default: {RATES}]")] = None,
    schedule: Annotated[Schedule, typer.Option(help="How the learning rate runs.")] = "wsd",
    warmup: Annotated[float, typer.Option(help="Share of the steps.")] = 0.02,
    decay: Annotated[float, typer.Option(help="Share of the steps.")] = 0.2,
    floor: Annotated[float, typer.Option(help="Last rate as a share of the peak.")] = 0.0,
    optimizer: Annotated[Optimizer, typer.Option(help="Moments are float32 but for adamw8bit.")] = (
        "adamw"
    ),
    weight_decay: Annotated[float, typer.Option(help="Of matrices.")] = 0.0,
    clip: Annotated[float, typer.Option(help="Largest gradient norm.")] = 1.0,
    spike: Annotated[
        float, typer.Option(help="Skip steps whose loss is above this times the mean; 0 for none.")
    ] = 4.0,
    replay_data: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Data not to forget; repeatable.")
    ] = None,
    replay: Annotated[float, typer.Option(help="Share of the rows that are replayed.")] = 0.05,
    held_out: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Text that is only measured, before and after."),
    ] = None,
    eval_steps: Annotated[
        int, typer.Option(help="Measure that every so many steps too; 0 at both ends alone.")
    ] = 0,
    select: Annotated[
        Selecting | None,
        typer.Option(help="paser: the documents on whose like the student lost most (--teacher)."),
    ] = None,
    select_share: Annotated[float, typer.Option(help="Of the documents, to select.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of the order, initialisations and halves.")] = 0,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")] = "cpu",
    precision: Annotated[
        Precision | None, typer.Option(help="[default: float32 on cpu, bfloat16 elsewhere]")
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute layers: less memory, more time.")
    ] = False,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile the decoder layers.  [default: in long runs on a GPU]",
        ),
    ] = None,
    kernels: Annotated[
        Kernels | None,
        typer.Option(help="liger: its kernels, on CUDA, if the first batch comes out the same."),
    ] = None,
    log: Annotated[
        list[str] | None,
        typer.Option(
            metavar="tensorboard|wandb", help="Gets the figures of every step too; repeatable."
        ),
    ] = None,
    save_steps: Annotated[int, typer.Option(help="Save every so many steps; 0 by time alone.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on with an earlier run, or start anew.")
    ] = True,
    keep_adapter: Annotated[
        bool, typer.Option("--keep-adapter", help="Keep LoRA's adapter beside the output.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a model that stands at the output.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the ask, train nothing.")
    ] = False,
    memory: Annotated[str, typer.Option(help="Memory to hold while writing.")] = "1G",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Heal a model after surgery: train it on text, alone or with its parent as the teacher.

    With --teacher the student learns to give the parent's answers (forward KL on logits), which
    needs less text than learning from the text alone. The run is kept in OUTPUT.surgery-run:
    after an interrupt, a crash or a kill the same command goes on where it was saved. Under
    torchrun the layers are sharded over the processes: torchrun --nproc-per-node N -m surgery
    recover ...

    Example: surgery recover pruned --teacher base --data text.jsonl --tokens 2M -o healed
    """
    has_teacher = teacher is not None or teacher_cache is not None
    if context is None:
        context = default_context(open_checkpoint(student).config)
    settings = Settings(
        train=train,
        rank=rank,
        lora_alpha=lora_alpha,
        lora_init=lora_init,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        losses=parse_losses(loss) if loss else {"kl": 1.0} if has_teacher else {"ce": 1.0},
        temperature=temperature,
        tokens=_tokens(tokens),
        context=context,
        batch_tokens=batch_tokens,
        micro_tokens=micro_tokens,
        lr=lr,
        schedule=schedule,
        warmup=warmup,
        decay=decay,
        floor=floor,
        optimizer=optimizer,
        weight_decay=weight_decay,
        clip=clip,
        spike=spike,
        replay=replay,
        seed=seed,
        precision=precision,
        checkpointing=checkpointing,
        compile=compiled,
        kernels=kernels,
        correct_teacher=_tokens(correct_teacher) if correct_teacher else 0,
        select=select,
        select_share=select_share,
        eval_steps=eval_steps,
        save_steps=save_steps,
    )
    ask = Ask(
        student=student,
        data=tuple(Source(path) for path in data),
        out=output or Path(f"{student.rstrip('/').rpartition('/')[2]}-healed"),
        settings=settings,
        teacher=teacher,
        cache=teacher_cache,
        replay=tuple(Source(path) for path in replay_data or ()),
        held_out=tuple(held_out or ()),
        device=device,
        resume=resume,
        keep_adapter=keep_adapter,
        logs=tuple(log or ()),
    )
    limits = {"memory": parse_size(memory, "--memory")}
    check_ask(ask, force=force)
    if dry_run:
        show_ask(ask, as_json=as_json)
        return
    _carry_out(ask, force=force, as_json=as_json, **limits)


def _carry_out(ask: Ask, *, force: bool, as_json: bool, **limits: Any) -> None:  # noqa: ANN401
    from surgery.recover.run import recover

    with live_line() as progress:
        found = recover(ask, force=force, progress=progress, remark=render.remark, **limits)
    if found.out is None:
        raise typer.Exit(_stopped(ask, found))
    if not found.first:
        return
    told = {"output": str(found.out), "adapter": found.adapter and str(found.adapter)}
    if as_json:
        render.print_json({**told, **found.told})
        return
    losses, held_out = found.curve.losses, found.told["held_out"]
    if losses:
        render.line(f"loss      {losses[0]:.4f} -> {losses[-1]:.4f}")
    if held_out:
        render.line(f"held out  {held_out['before']:.4f} -> {held_out['after']:.4f} nats a token")
    render.line(f"{found.out}  {found.curve.step} steps, {found.curve.tokens:,} tokens")


def _stopped(ask: Ask, found: "Recovery") -> int:
    if found.first:
        step = found.curve.step
        render.remark(f"saved at step {step} in {ask.folder}; the same command goes on")
    return int(Exit.INTERRUPTED)


def _tokens(text: str) -> int:
    from cli.stack import parse_tokens

    found = parse_tokens(text)
    if not 1 <= found < MOST_TOKENS:
        raise RecipeError(f"--tokens {text}", "is not a number of tokens", "for instance 10M")
    return int(found)
