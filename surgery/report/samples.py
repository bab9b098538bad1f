"""What models write behind the same beginnings, side by side."""

from collections.abc import Sequence

from surgery.report.blocks import Block, Heading, Section, Table, shown
from surgery.report.fields import Fields, named
from surgery.report.measured import Run

ABOUT = (
    "Greedy continuations; the share of 4-grams of tokens that were written before is behind each "
    "text."
)


def samples(runs: Sequence[Run]) -> Section:
    """Return a table for each run: a beginning a row, a model a column."""
    blocks: list[Block] = []
    for run in runs:
        written = {model.label: list(model.fields.each("samples")) for model in run.models}
        written = {label: texts for label, texts in written.items() if texts}
        if written:
            blocks += [Heading(run.name)] if run.name else []
            blocks.append(_table(written))
    return Section("samples", "Samples", blocks, ABOUT)


def _table(written: dict[str, list[Fields]]) -> Table:
    most = max(len(texts) for texts in written.values())
    rows = []
    for i in range(most):
        here = [texts[i] if i < len(texts) else None for texts in written.values()]
        first = next(sample for sample in here if sample is not None)
        begun = f"{named(first.text('document') or '-')}\n{first.text('prompt') or ''}"
        rows.append((begun, *(_text(sample) for sample in here)))
    return Table(("beginning", *written), rows, prose=True)


def _text(sample: Fields | None) -> str:
    if sample is None:
        return "-"
    repeated = shown(sample.number("repetition"), ".0%")
    return f"{sample.text('text') or ''}\n[{repeated} repeated]"
