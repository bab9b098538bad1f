"""`surgery eval`: bits per byte, and how far children are from their parents."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import render
from cli.saving import check_file, save_json
from surgery.errors import VerificationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from surgery.evaluate import Evaluation

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}


def command(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="Directories or hub refs; the first is the parent."),
    ],
    *,
    text: Annotated[
        list[str],
        typer.Option(
            "--text",
            metavar="FILE...",
            help="Text to score, a row of the table each. A .jsonl file holds a document a line, "
            'under "text"; any other file is one document.',
        ),
    ],
    parent: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL", help="Compare with this model instead; as often as needed."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            metavar="NAME|FILE",
            help="A task of lm-evaluation-harness (extra: eval): its name, its .yaml file, or a "
            ".jsonl file as for --pairs.",
        ),
    ] = None,
    pairs: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help='Questions, one JSON object a line: "good" and "bad", or "prompt", "choices" '
            'and "answer". Needs no extra.',
        ),
    ] = None,
    normalize: Annotated[
        str,
        typer.Option(
            metavar="LENGTH",
            help="Divide the log-probability of a choice of --pairs by its length in characters, "
            "bytes or tokens; or none.",
        ),
    ] = "none",
    maps: Annotated[
        bool,
        typer.Option("--maps", help="Compare weights, and layers by CKA, with every parent."),
    ] = False,
    samples: Annotated[
        int, typer.Option(metavar="N", help="Let models go on behind N documents' beginnings.")
    ] = 0,
    speed: Annotated[
        bool, typer.Option("--speed", help="Time reading and writing, and weigh the cache.")
    ] = False,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LIMIT",
            help='Exit with 3 unless it holds for every child: "bpb<parent*1.02", "kl<0.05", '
            '"top1>90%", "acc:TASK>=parent".',
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Save the result as JSON as well."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE of -o.")] = False,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens fed at most. [default: what all models take, up to 2048]"),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens a window moves on. [default: half the context]")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens fed at once.")] = 8192,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(help="What to compute in. [default: float32 on cpu, as stored elsewhere]"),
    ] = None,
    bootstrap: Annotated[int, typer.Option(help="Draws behind each interval.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    documents: Annotated[
        bool, typer.Option("--documents", help="List every document as well.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure models on text: bits per byte, and divergence from their parents.

    Every token is scored once, with the most context that the windows allow. Differences from the
    parents come with a 95% interval, by a bootstrap over documents that pairs the models.

    Example: surgery eval base base-stack2 --text held-out.jsonl
    """
    from surgery.evaluate import evaluate

    named, more = models_and_texts(models)
    check_file(output, force=force)
    with _progress() as progress:
        found = evaluate(
            named,
            [*text, *more],
            parent=parent,
            maps=maps,
            samples=samples,
            speed=speed,
            tasks=task or (),
            pairs=pairs or (),
            normalize=normalize,
            gates=gate or (),
            context=context,
            stride=stride,
            batch_tokens=batch_tokens,
            device=device,
            dtype=dtype,
            bootstrap=bootstrap,
            seed=seed,
            progress=progress,
        )
    if output is not None:
        save_json(found.to_dict(), output)
    if as_json:
        render.print_json(found.to_dict())
    else:
        from cli.eval_tables import show

        show(found, documents=documents)
    _check_gates(found)


def _check_gates(found: Evaluation) -> None:
    """Tell which gates fail; the result has been printed by then."""
    failed = [each.sentence for each in found.gates if not each.holds]
    if failed:
        raise VerificationError("--gate", "; ".join(failed))


def models_and_texts(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into models and texts: a shell expands `--text *.md` to one and arguments."""
    paths = [(argument, Path(argument)) for argument in arguments]
    texts = [a for a, path in paths if path.is_file() and path.suffix.lower() not in _WEIGHTS]
    return [a for a in arguments if a not in texts], texts


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None] | None]:
    """Draw one bar per model on stderr, where a person looks at it."""
    if not render.is_watched(stderr=True):
        yield None
        return
    from rich.progress import Progress, TaskID

    with Progress(console=render.err(), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def report(name: str, fed: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total)
            bar.update(tasks[name], completed=fed, total=total)

        yield report
