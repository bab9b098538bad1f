"""Size, speed and quality: which models no other beats."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from surgery.charts import INK, LINES, SAME, piece
from surgery.report.blocks import Block, Chart, Heading, Section, Table, choose, shown
from surgery.report.fields import Fields
from surgery.report.measured import Measured, Run

QUALITY = "bits_per_byte"
ABOUT = (
    "A model is on the front where no other of the same run is at least as good in every figure "
    "and better in one. Bits per byte over all text, less is better; speed is that of one "
    "sequence at a time, a figure to compare models by in one run."
)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a model costs, or how fast it is.

    Attributes:
        key: of the field, unique on the page.
        form: how a table shows it.
        more: more of it is better.
    """

    key: str
    label: str
    form: str
    more: bool = False


COSTS = (
    Cost("parameters", "parameters", ",.0f"),
    Cost("decode_per_second", "tokens/s of writing", ".1f", more=True),
    Cost("prefill_per_second", "tokens/s of reading", ".1f", more=True),
    Cost("decode_peak", "bytes of memory while writing", ",.0f"),
    Cost("cache_per_token", "bytes of cache per token", ",.0f"),
)
THREE = COSTS[:2]  # size and speed, beside quality


@dataclass(frozen=True, slots=True)
class Point:
    """A model and its figures that are known."""

    label: str
    figures: Mapping[str, float]


def pareto(runs: Sequence[Run]) -> Section:
    """Return a front for each figure, and a table of them all."""
    blocks: list[Block] = []
    for run in runs:
        points = [point for model in run.models if QUALITY in (point := _point(model)).figures]
        charts = [(c.label, chart) for c in COSTS if (chart := _chart(run, points, c))]
        if charts:
            blocks += [Heading(run.name)] if run.name else []
            blocks += [*choose(f"fronts-{run.number}", charts), _table(points)]
    return Section("pareto", "Size, speed and quality", blocks, ABOUT)


def _point(model: Measured) -> Point:
    speed = model.fields.one("speed") or Fields({}, model.fields.file)
    found = {cost.key: speed.number(cost.key) for cost in COSTS[1:]}
    found["parameters"] = model.fields.number("parameters")
    found[QUALITY] = model.fields.some("overall").number(QUALITY)
    return Point(model.label, {key: value for key, value in found.items() if value is not None})


def front(points: Sequence[Point], costs: Sequence[Cost]) -> list[Point]:
    """Return the points that no other dominates in these figures and quality."""
    known = [p for p in points if all(cost.key in p.figures for cost in costs)]
    sides = {id(p): _sides(p, costs) for p in known}
    return [p for p in known if not any(_beats(sides[id(o)], sides[id(p)]) for o in known)]


def _sides(point: Point, costs: Sequence[Cost]) -> list[float]:
    """Return figures of which less is better."""
    signed = (point.figures[cost.key] * (-1 if cost.more else 1) for cost in costs)
    return [point.figures[QUALITY], *signed]


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def _chart(run: Run, points: Sequence[Point], cost: Cost) -> Chart | None:
    import plotly.graph_objects as go

    known = [point for point in points if cost.key in point.figures]
    if len(known) < 2:  # noqa: PLR2004 - one model has nothing to be compared with
        return None
    best = sorted(front(known, [cost]), key=lambda p: p.figures[cost.key])
    steps = _staircase([(p.figures[cost.key], p.figures[QUALITY]) for p in best], more=cost.more)
    figure = go.Figure()
    line = {"color": LINES["feed-forward"], "width": 1.5, "dash": "dot"}
    figure.add_scatter(
        x=[x for x, _ in steps], y=[y for _, y in steps], mode="lines", line=line, name="front",
        hoverinfo="skip",
    )  # fmt: skip
    figure.add_scatter(
        x=[point.figures[cost.key] for point in known],
        y=[point.figures[QUALITY] for point in known],
        text=[html.escape(point.label) for point in known],
        mode="markers+text",
        textposition="top center",
        hoverinfo="x+y+text",
        cliponaxis=False,
        marker={
            "size": 11,
            "color": [LINES["feed-forward"] if point in best else INK for point in known],
        },
    )
    better = "more" if cost.more else "less"
    figure.update_layout(showlegend=False)
    figure.update_xaxes(title=f"{cost.label} ({better} is better)", gridcolor=SAME, zeroline=False)
    figure.update_yaxes(title="bits/byte (less is better)", gridcolor=SAME, zeroline=False)
    return Chart(piece(figure, f"front-{run.number}-{cost.key}", height=380))


def _staircase(corners: Sequence[tuple[float, float]], *, more: bool) -> list[tuple[float, float]]:
    """Return the edge of what the front dominates: steps from corner to corner."""
    line = list(corners[:1])
    for (x, y), (next_x, next_y) in pairwise(corners):
        line += [(x, next_y) if more else (next_x, y), (next_x, next_y)]
    return line


def _table(points: Sequence[Point]) -> Table:
    speeds = all(cost.key in point.figures for point in points for cost in THREE)
    costs = THREE if speeds else THREE[:1]
    best = front(points, costs)
    told = "size, speed and quality" if speeds else "size and quality"
    headings = ("model", "bits/byte", *(cost.label for cost in COSTS), f"on the front of {told}")
    rows = [
        (
            point.label,
            shown(point.figures[QUALITY], ".4f"),
            *(shown(point.figures.get(cost.key), cost.form) for cost in COSTS),
            "yes" if point in best else "no",
        )
        for point in points
    ]
    return Table(headings, rows)
