"""Bits per byte of children beside parents, with intervals."""

import html
from collections.abc import Iterator, Sequence

from surgery.charts import DIVERGING, map_height, piece
from surgery.report.blocks import Block, Chart, Heading, Section, Table, Text, choose, shown
from surgery.report.fields import Fields, named
from surgery.report.measured import Measured, Pair, Run

ALL = "all text"
HEADINGS = (
    "text", "model", "parent", "bits/byte", "ppl", "change", "95% interval", "verdict",
    "KL mean", "KL median", "KL p95", "KL p99", "top-1", "logit RMS",
)  # fmt: skip
ABOUT = (
    "The change is child minus parent in bits per byte, less is better; the interval is a "
    "bootstrap over documents that draws the same ones for both. Cells are grey where the change "
    "cannot be told from chance. KL is in nats per token."
)
TOLD_APART = {"better", "worse"}


def quality(runs: Sequence[Run]) -> Section:
    """Return the matrix of children by parents, and all figures in a table."""
    blocks = [block for run in runs if run.models for block in _blocks(run)]
    return Section("quality", "Quality", blocks, ABOUT)


def gates(runs: Sequence[Run]) -> Section:
    """Return what was demanded, and whether it holds."""
    rows = [
        (
            gate.text("gate") or "-",
            run.labels.get(gate.text("model") or "", "-"),
            run.labels.get(gate.text("parent") or "", "-"),
            shown(gate.number("value")),
            shown(gate.number("limit")),
            "holds" if gate.flag("holds") else "fails",
        )
        for run in runs
        for gate in run.fields.each("gates")
    ]
    headings = ("gate", "model", "parent", "figure", "limit", "")
    return Section("gates", "Gates", [Table(headings, rows)] if rows else [])


def _blocks(run: Run) -> Iterator[Block]:
    if run.name:
        yield Heading(run.name)
    pairs = list(run.pairs())
    charts = [(text, _matrix(run, pairs, i)) for i, text in enumerate(_texts(pairs))]
    yield from choose(f"matrices-{run.number}", charts)
    yield Table(HEADINGS, list(_rows(run)))
    yield Text(_settings(run.fields))


def _texts(pairs: Sequence[Pair]) -> list[str]:
    """Return the texts that pairs are compared on; the whole alone where there is one."""
    names = dict.fromkeys(
        named(t.text("name") or "") for p in pairs for t in p.fields.each("domains")
    )
    if not pairs:
        return []
    return [ALL, *names] if len(names) > 1 else [ALL]


def _compared(pair: Pair, place: int) -> Fields | None:
    """Return a pair's figures on one of `_texts`."""
    if place == 0:
        return pair.fields.one("overall")
    domains = list(pair.fields.each("domains"))
    return domains[place - 1] if place <= len(domains) else None


def _matrix(run: Run, pairs: Sequence[Pair], place: int) -> Chart:
    import plotly.graph_objects as go

    children = list(dict.fromkeys(pair.child for pair in pairs))
    parents = list(dict.fromkeys(pair.parent for pair in pairs))
    found = {(p.child, p.parent): _difference(_compared(p, place)) for p in pairs}
    grid = [[found.get((child, parent)) for parent in parents] for child in children]
    values = [[_coloured(cell) for cell in row] for row in grid]
    changes = [cell.number("bits_per_byte") or 0.0 for row in grid for cell in row if cell]
    reach = max(map(abs, changes), default=0) or 1e-3
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=[html.escape(parent) for parent in parents],
            y=[html.escape(child) for child in children],
            text=[[_cell(cell) for cell in row] for row in grid],
            texttemplate="%{text}",
            hoverinfo="text",
            colorscale=DIVERGING,
            zmin=-reach,
            zmax=reach,
            xgap=2,
            ygap=2,
            colorbar={"title": {"text": "change, bits/byte", "side": "right"}, "thickness": 14},
        )
    )
    figure.update_xaxes(side="top", type="category", title="parent", showgrid=False)
    figure.update_yaxes(autorange="reversed", type="category", title="child", showgrid=False)
    figure.update_yaxes(automargin=True)
    height = map_height(0) + 56 * max(len(children) - 2, 0)
    return Chart(piece(figure, f"matrix-{run.number}-{place}", height=height))


def _difference(compared: Fields | None) -> Fields | None:
    return compared.one("difference") if compared else None


def _cell(found: Fields | None) -> str:
    if found is None:
        return ""
    change = f"<b>{shown(found.number('bits_per_byte'), '+.4f')}</b>"
    return f"{change}<br>{_interval(found)}<br>{html.escape(found.text('verdict') or '')}"


def _coloured(found: Fields | None) -> float | None:
    """Return what decides a cell's colour: no change where none can be told from chance."""
    if found is None:
        return None
    return found.number("bits_per_byte") if found.text("verdict") in TOLD_APART else 0.0


def _interval(found: Fields) -> str:
    low, high = found.number("low"), found.number("high")
    return "-" if low is None or high is None else f"{low:+.4f} to {high:+.4f}"


def _rows(run: Run) -> Iterator[tuple[str, ...]]:
    for model in run.models:
        for place, figures in enumerate(_figures(model)):
            text = ALL if place == 0 else named(figures.text("name") or "-")
            head = (text, model.label)
            size = (
                shown(figures.number("bits_per_byte"), ".4f"),
                shown(figures.number("perplexity")),
            )
            compared = [
                (pair.parent, _compared(pair, place))
                for pair in run.pairs()
                if pair.child == model.label
            ]
            if not compared:
                yield (*head, "parent" if model.is_parent else "-", *size, *["-"] * 9)
            for parent, found in compared:
                yield (*head, parent, *size, *_beside(found))


def _figures(model: Measured) -> list[Fields]:
    """Return a model's figures on all text, and on each where there are several."""
    domains = list(model.fields.each("domains"))
    return [model.fields.some("overall"), *(domains if len(domains) > 1 else ())]


def _beside(found: Fields | None) -> Iterator[str]:
    change = _difference(found)
    if change is None:
        yield from ("-", "-", "-")
    else:
        yield shown(change.number("bits_per_byte"), "+.4f")
        yield _interval(change)
        yield change.text("verdict") or "-"
    kl = found.one("divergence") if found else None
    for key in ("mean", "median", "p95", "p99"):
        yield shown(kl.number(key) if kl else None, ".4f")
    yield shown(kl.number("agreement") if kl else None, ".1%")
    yield shown(kl.number("logit_rms") if kl else None, ".4f")


def _settings(run: Fields) -> str:
    numbers = (
        ("context", "context"),
        ("stride", "stride"),
        ("bootstrap", "draws"),
        ("seed", "seed"),
    )
    told = [f"{label} {shown(run.number(key), 'g')}" for key, label in numbers]
    return ", ".join([*told, f"on {run.text('device') or 'an unknown device'}"]) + "."
