"""Curves of recoveries: from their folders step by step, else from the record of what came out."""

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from surgery.charts import LINES, SAME, piece
from surgery.report.blocks import Block, Chart, Section, Table, choose, shown
from surgery.report.fields import Fields, named
from surgery.report.lineage import Ancestor
from surgery.report.linearized import OPERATION
from surgery.report.measured import labelled
from surgery.report.reading import Collected, Training

COLOURS = [colour for name, colour in LINES.items() if name != "whole layer"]
MOST = 2000  # points of a line; beyond, every n-th is drawn
# Figures of a step that are no losses, and how their axis is called.
FIGURES = {
    "lr": "learning rate",
    "gradient_norm": "norm of the gradient",
    "tokens_per_second": "tokens/s",
    "tflops": "TFLOP/s",
    "mfu": "MFU",
}
NO_LOSS = {"step", "steps", "tokens", "seconds", "verdict", "loss", *FIGURES}

Line = list[tuple[float, float | None]]
HEADINGS = (
    "recovery", "trains", "parameters trained", "teacher", "steps", "skipped", "tokens",
    "loss, first", "loss, last", "held out before", "held out after",
)  # fmt: skip
ABOUT = (
    "Losses and held-out figures are means in nats per token; those of a transfer are the error of "
    "layers' outputs, as a share of their variance."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A recovery as the page shows it.

    Attributes:
        lines: by the name of a figure, values over steps.
        told: the facts that the record holds; empty while the run goes on.
    """

    name: str
    lines: Mapping[str, Line]
    mode: str
    told: Fields
    losses: Sequence[str] = field(default=())


def curves(collected: Collected) -> Section:
    """Return charts of all recoveries, and a table of what came out."""
    found = list(_curves(collected))
    names = labelled([(curve.name, curve.name) for curve in found])
    shown_as = list(zip(names, found, strict=True))
    charts = [("loss", _chart(shown_as, ["loss"], "loss", "loss"))]
    parts = list(dict.fromkeys(part for curve in found for part in curve.losses))
    if len(parts) > 1:
        charts.append(("parts of the loss", _chart(shown_as, parts, "parts", "loss")))
    charts += [
        (label, _chart(shown_as, [key], key, label))
        for key, label in FIGURES.items()
        if any(curve.lines.get(key) for curve in found)
    ]
    blocks: list[Block] = []
    if found:
        blocks = [*choose("curves", charts), Table(HEADINGS, [_row(n, c) for n, c in shown_as])]
    return Section("curves", "Recoveries", blocks, ABOUT)


def _curves(collected: Collected) -> Iterator[Curve]:
    """Yield a curve for each recovery, the finer one where there are two of the same."""
    recovered = {m.key: m for m in collected.lineage.made if m.operation == "recover"}
    for training in collected.trainings:
        place = training.path.resolve().with_name(training.name)
        yield _of_folder(training, recovered.pop(str(place), None))
    for model in recovered.values():
        yield _of_record(model)
    for model in collected.lineage.made:
        if model.operation == OPERATION and model.record:
            yield from _of_stages(model.name, model.record.some("facts"))


def _of_folder(training: Training, model: Ancestor | None) -> Curve:
    steps = training.steps
    keys = dict.fromkeys(key for step in steps for key in step.values)
    parts = [key for key in keys if key not in NO_LOSS]
    lines = {key: _line(steps, key) for key in ("loss", *parts, *FIGURES) if key in keys}
    empty = Fields({}, training.path)
    told = model.record.some("facts") if model and model.record else empty
    mode = training.settings.get("train")
    return Curve(
        name=training.name,
        lines=lines,
        mode=mode if isinstance(mode, str) else "-",
        told=told,
        losses=parts,
    )


def _line(steps: Sequence[Fields], key: str) -> Line:
    at = (step.number("step") for step in steps)
    values = (step.number(key) for step in steps)
    return [
        (float(i if x is None else x), y) for i, (x, y) in enumerate(zip(at, values, strict=True))
    ]


def _of_record(model: Ancestor) -> Curve:
    facts = model.record.some("facts") if model.record else Fields({}, Path(model.key))
    return _told(model.name, facts.text("trained") or "-", facts)


def _of_stages(name: str, facts: Fields) -> Iterator[Curve]:
    for stage in facts.each("stages"):
        mode = stage.text("stage") or "-"
        yield _told(f"{name}: {mode}", mode, stage)


def _told(name: str, mode: str, facts: Fields) -> Curve:
    line = [(row[0] or 0.0, row[1]) for row in facts.grid("losses") if len(row) > 1]
    return Curve(name=name, lines={"loss": line} if line else {}, mode=mode, told=facts)


def _chart(
    curves: Sequence[tuple[str, Curve]], keys: Sequence[str], name: str, title: str
) -> Chart:
    import plotly.graph_objects as go

    figure = go.Figure()
    drawn = [(label, key, c.lines[key]) for label, c in curves for key in keys if c.lines.get(key)]
    for i, (label, key, line) in enumerate(drawn):
        every = -(-len(line) // MOST)
        figure.add_scatter(
            x=[x for x, _ in line[::every]],
            y=[y for _, y in line[::every]],
            name=html.escape(label if len(keys) == 1 else f"{label}: {key}"),
            mode="lines",
            line={"color": COLOURS[i % len(COLOURS)], "width": 2},
        )
    figure.update_xaxes(title="step", gridcolor=SAME, zeroline=False)
    figure.update_yaxes(title=title, gridcolor=SAME, zeroline=False)
    figure.update_layout(showlegend=True, hovermode="x unified")
    figure.update_layout(legend={"orientation": "h", "y": 1.12})
    return Chart(piece(figure, f"curve-{name}", height=360))


def _row(name: str, curve: Curve) -> tuple[str, ...]:
    told, losses = curve.told, [y for _, y in curve.lines.get("loss", ()) if y is not None]
    held = told.one("held_out") or Fields({}, told.file)
    return (
        name,
        curve.mode,
        shown(told.number("parameters_trained"), ",.0f"),
        named(told.text("teacher") or "-"),
        shown(told.number("steps") or _steps(curve), ",.0f"),
        shown(told.number("steps_skipped"), ",.0f"),
        shown(told.number("tokens"), ",.0f"),
        shown(losses[0] if losses else None, ".4f"),
        shown(losses[-1] if losses else None, ".4f"),
        shown(held.number("before"), ".4f"),
        shown(held.number("after"), ".4f"),
    )


def _steps(curve: Curve) -> float | None:
    """Return the steps of a run that has no record yet."""
    line = curve.lines.get("loss")
    return line[-1][0] + 1 if line else None
