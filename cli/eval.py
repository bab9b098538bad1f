"""`surgery eval`: bits per byte, and how far children are from their parent."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import render

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from surgery.evaluate import Divergence, Evaluation, Figures, ModelFigures

_COLUMNS = (
    *("text", "model", "bits/byte", "change", "95% interval", "verdict"),
    *("KL mean", "KL p99", "top-1"),
)
_NUMBERS = (2, 3, 4, 6, 7, 8)
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
        str | None, typer.Option(metavar="MODEL", help="Compare with this model instead.")
    ] = None,
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
    """Measure models on text: bits per byte, and divergence from a parent.

    Every token is scored once, with the most context that the windows allow. Differences from the
    parent come with a 95% interval, by a bootstrap over documents that pairs the models.

    Example: surgery eval base base-stack2 --text held-out.jsonl
    """
    from surgery.evaluate import evaluate

    named, more = _sorted_out(models)
    with _progress() as progress:
        found = evaluate(
            named,
            [*text, *more],
            parent=parent,
            context=context,
            stride=stride,
            batch_tokens=batch_tokens,
            device=device,
            dtype=dtype,
            bootstrap=bootstrap,
            seed=seed,
            progress=progress,
        )
    if as_json:
        render.print_json(found.to_dict())
    else:
        _show(found, documents=documents)


def _show(found: Evaluation, *, documents: bool) -> None:
    render.table(_COLUMNS, _rows(found, documents=documents), numbers=_NUMBERS)
    for note in _notes(found):
        render.line(note, "dim")


def _sorted_out(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into models and texts: a shell expands `--text *.md` to one and arguments."""
    paths = [(argument, Path(argument)) for argument in arguments]
    texts = [a for a, path in paths if path.is_file() and path.suffix.lower() not in _WEIGHTS]
    return [a for a in arguments if a not in texts], texts


def _rows(found: Evaluation, *, documents: bool) -> list[tuple[str, ...]]:
    """Return the cells of the table: one text after the other, the models in each."""
    by_model = [[*m.domains, *([m.overall] if m.domains[1:] else [])] for m in found.models]
    rows = _section(found, by_model)
    if documents:
        return _section(found, [m.per_document for m in found.models]) + rows
    return rows


def _section(found: Evaluation, by_model: Sequence[Sequence[Figures]]) -> list[tuple[str, ...]]:
    models = _short([model.ref for model in found.models])
    texts = _short([figures.name for figures in by_model[0]])
    return [
        ("" if number else text, name, *_cells(figures, parent=number == 0))
        for text, group in zip(texts, zip(*by_model, strict=True), strict=True)
        for number, (name, figures) in enumerate(zip(models, group, strict=True))
    ]


def _cells(figures: Figures, *, parent: bool) -> tuple[str, ...]:
    bits = "-" if figures.bits_per_byte is None else f"{figures.bits_per_byte:.4f}"
    change, interval, verdict = "", "", "parent" if parent else ""
    if figures.difference is not None:
        difference = figures.difference
        change, verdict = f"{difference.bits_per_byte:+.4f}", difference.verdict
        if difference.low is not None and difference.high is not None:
            interval = f"{difference.low:+.4f} {difference.high:+.4f}"
    return (bits, change, interval, verdict, *_divergence(figures.divergence))


def _divergence(found: Divergence | None) -> tuple[str, ...]:
    if found is None:
        return ("",) * 3
    return (_nats(found.mean), _nats(found.p99), f"{found.agreement:.1%}")


def _nats(value: float) -> str:
    return f"{value:.1e}" if 0 < value < 0.001 else f"{value:.4f}"  # noqa: PLR2004


def _notes(found: Evaluation) -> list[str]:
    """Return what a reader has to know to read the figures right."""
    overall = found.models[0].overall
    dtypes = ", ".join(dict.fromkeys(model.dtype for model in found.models))
    notes = [
        f"context {found.context}, stride {found.stride}, {dtypes} on {found.device}; "
        f"{overall.documents} document{'s'[: overall.documents > 1]}, {overall.bytes} bytes; "
        "KL in nats per token"
    ]
    said: dict[str, list[str]] = {}
    for model, name in zip(found.models, _short([m.ref for m in found.models]), strict=True):
        for note in _model_notes(model):
            said.setdefault(note, []).append(name)
    notes += [f"{', '.join(names)}: {note}" for note, names in said.items()]
    if any(d.difference and d.difference.low is None for m in found.models for d in m.domains):
        notes.append(f"a text of fewer than {_fewest()} documents has no interval")
    return notes


def _model_notes(model: ModelFigures) -> list[str]:
    notes = []
    if model.not_compared is not None:
        notes.append(f"no KL and top-1, {model.not_compared}")
    if model.mark == "none":
        notes.append("no beginning-of-sequence token, so a document's first token is not scored")
    if model.overall.unknown:
        lost, tokens = model.overall.unknown, model.overall.tokens
        notes.append(f"{lost} of {tokens} tokens are unknown ones, which flatters bits per byte")
    return notes


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


def _short(names: Sequence[str]) -> list[str]:
    """Return last parts of paths where they tell them apart, else the paths as they are."""
    last = [Path(name).name or name for name in names]
    return [
        short if last.count(short) == 1 else name for short, name in zip(last, names, strict=True)
    ]


def _fewest() -> int:
    from surgery.evaluate.statistics import FEWEST_DOCUMENTS

    return FEWEST_DOCUMENTS
