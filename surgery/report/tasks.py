"""Tasks: what each model scores, and which differences are more than chance."""

import html
from collections.abc import Iterator, Sequence

from surgery.charts import LINES, SAME, piece
from surgery.report.blocks import Block, Chart, Heading, Section, Table, choose, shown
from surgery.report.fields import Fields, named
from surgery.report.measured import Run, labelled

COLOURS = [colour for name, colour in LINES.items() if name != "whole layer"]
SCORES = ("task", "metric", "model", "value", "95% interval")
CHANGES = (
    "task", "child", "parent", "documents", "change", "95% interval", "right only by the child",
    "only by the parent", "p", "p (Holm)", "verdict",
)  # fmt: skip
ABOUT = (
    "Documents are paired. p is that of the exact McNemar test, adjusted by Holm over all tasks "
    "of one child and parent; where there is none, the interval decides."
)


def tasks(runs: Sequence[Run]) -> Section:
    """Return scores as a chart and a table, and the differences."""
    blocks: list[Block] = []
    for run in runs:
        found = list(run.fields.each("tasks"))
        if found:
            blocks += [Heading(run.name)] if run.name else []
            blocks += [*_charts(run, found), Table(SCORES, list(_scores(run, found)))]
            changes = list(_changes(run, found))
            blocks += [Table(CHANGES, changes)] if changes else []
    return Section("tasks", "Tasks", blocks, ABOUT)


def _charts(run: Run, found: Sequence[Fields]) -> list[Block]:
    """Return a chart for each metric: accuracies and perplexities share no axis."""
    metrics = list(dict.fromkeys(task.text("metric") or "-" for task in found))
    charts = []
    for i, metric in enumerate(metrics):
        alike = [task for task in found if (task.text("metric") or "-") == metric]
        charts.append((metric, _chart(run, alike, f"scores-{run.number}-{i}", metric)))
    return choose(f"scores-of-{run.number}", charts)


def _chart(run: Run, found: Sequence[Fields], name: str, metric: str) -> Chart:
    import plotly.graph_objects as go

    names = labelled([(_name(task), _name(task)) for task in found])
    figure = go.Figure()
    for i, (ref, label) in enumerate(run.labels.items()):
        scores = [_of(task, ref) for task in found]
        values = [score.number("value") if score else None for score in scores]
        figure.add_bar(
            x=[html.escape(name) for name in names],
            y=values,
            error_y=_errors(values, scores),
            name=html.escape(label),
            marker={"color": COLOURS[i % len(COLOURS)]},
        )
    figure.update_layout(barmode="group", legend={"orientation": "h", "y": 1.15})
    figure.update_xaxes(type="category")
    figure.update_yaxes(gridcolor=SAME, zeroline=False, title=html.escape(metric))
    return Chart(piece(figure, name, height=340))


def _errors(values: Sequence[float | None], scores: Sequence[Fields | None]) -> dict[str, object]:
    """Return error bars where there are intervals."""
    reach = [_reach(value, score) for value, score in zip(values, scores, strict=True)]
    above, below = [up for _, up in reach], [down for down, _ in reach]
    # Without caps nothing is drawn where there is no interval.
    return {"symmetric": False, "array": above, "arrayminus": below, "width": 0}


def _reach(value: float | None, score: Fields | None) -> tuple[float | None, float | None]:
    """Return how far an interval goes below and above a value."""
    low, high = (score.number("low"), score.number("high")) if score else (None, None)
    if value is None or low is None or high is None:
        return None, None
    return max(value - low, 0.0), max(high - value, 0.0)


def _of(task: Fields, ref: str) -> Fields | None:
    return next((score for score in task.each("models") if score.text("model") == ref), None)


def _name(task: Fields) -> str:
    return named(task.text("name") or "(no name)")


def _scores(run: Run, found: Sequence[Fields]) -> Iterator[tuple[str, ...]]:
    for task in found:
        for score in task.each("models"):
            label = run.labels.get(score.text("model") or "", "-")
            metric = task.text("metric") or "-"
            yield _name(task), metric, label, shown(score.number("value"), ".4f"), _interval(score)


def _interval(found: Fields, form: str = ".4f") -> str:
    low, high = found.number("low"), found.number("high")
    return "-" if low is None or high is None else f"{low:{form}} to {high:{form}}"


def _changes(run: Run, found: Sequence[Fields]) -> Iterator[tuple[str, ...]]:
    for task in found:
        for change in task.each("differences"):
            yield (
                _name(task),
                run.labels.get(change.text("child") or "", "-"),
                run.labels.get(change.text("parent") or "", "-"),
                shown(change.number("documents"), "g"),
                shown(change.number("difference"), "+.4f"),
                _interval(change, "+.4f"),
                shown(change.number("only_child"), "g"),
                shown(change.number("only_parent"), "g"),
                shown(change.number("p"), ".3g"),
                shown(change.number("p_holm"), ".3g"),
                change.text("verdict") or "-",
            )
