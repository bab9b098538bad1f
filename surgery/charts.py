"""Charts as pieces of a web page, drawn with plotly (the `html` extra)."""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import ceil, floor, log10
from typing import Any

from surgery.difference import Difference
from surgery.errors import RecipeError
from surgery.sums import Figures

SEQUENTIAL = "Viridis"
DIVERGING = [[0, "#3b7dd8"], [0.5, "#b8bcc4"], [1, "#e07b39"]]
SAME = "rgba(138,143,152,0.22)"  # identical: neither light nor dark paper swallows it
INK = "#8a8f98"  # for who takes a chart out of the page, whose style sheet overrides it
LINES = {
    "whole layer": INK, "attention": "#3b7dd8", "feed-forward": "#e07b39", "experts": "#2a9d8f",
    "router": "#c2528b", "norms": "#9b6dd6", "other": "#a08050",
}  # fmt: skip
TINY = 1e-16  # float64 cannot tell a smaller 1 - cosine from 0
FEW_DECADES = 3
FEW, MANY = 12, 40  # layers: up to the one all are numbered, beyond the other rows are thin
WIDE = 10.0  # a range this many times its start is coloured by powers of ten


@dataclass(frozen=True, slots=True)
class Metric:
    """What the heat map can show: a key, a label, and its value for a pair that differs."""

    key: str
    label: str
    value: Callable[[Figures], float | None]
    diverging: bool = False


def _less_than_one(value: float | None) -> float | None:
    return None if value is None else max(1.0 - value, TINY)


METRICS = (
    Metric("relative_l2", "relative L2", lambda f: f.relative_l2),
    Metric("cosine", "1 - cosine", lambda f: _less_than_one(f.cosine)),
    Metric("signs", "share of signs that differ", lambda f: _less_than_one(f.sign_agreement)),
    Metric("norm_ratio", "norm ratio", lambda f: f.norm_ratio, diverging=True),
)


def require_plotly(option: str = "--html") -> None:
    """Make sure that charts can be drawn, before any work is done.

    Args:
        option: what asks for them.

    Raises:
        RecipeError: plotly is not installed.
    """
    if find_spec("plotly") is None:
        fact = "the page is drawn with plotly, which is not installed"
        raise RecipeError(option, fact, "run: pip install 'model-surgery[html]'")


def plotly_program() -> str:
    """Return what draws the charts in the browser, to be put into the page."""
    from plotly.offline import get_plotlyjs

    program: str = get_plotlyjs()
    return program


def heat_map(found: Difference, metric: Metric) -> str:
    """Return the layers by modules map of one metric as HTML."""
    import plotly.graph_objects as go

    layers, cells = list(found.layers), found.cells
    groups = [[cells.get((layer, module)) for module in found.modules] for layer in layers]
    grid = [[group.figures if group else None for group in row] for row in groups]
    same = [[0 if f and f.relative_l2 == 0 else None for f in row] for row in grid]
    values = [[_drawn(f, metric) for f in row] for row in grid]
    place = {
        "x": [html.escape(module) for module in found.modules],
        "y": layers,
        "xgap": 1,
        "ygap": 1,
        "hoverinfo": "text",
        "hovertext": [
            [_hover(layer, module, f) for module, f in zip(found.modules, row, strict=True)]
            for layer, row in zip(layers, grid, strict=True)
        ],
    }
    grey = go.Heatmap(z=same, colorscale=[[0, SAME], [1, SAME]], showscale=False, **place)
    drawn = go.Heatmap(**coloured(values, metric), **place)
    figure = go.Figure([grey, drawn])
    figure.update_xaxes(side="top", tickangle=-40, type="category", showgrid=False)
    figure.update_yaxes(autorange="reversed", title="layer", showgrid=False, **numbered(layers))
    return piece(figure, f"map-{metric.key}", height=map_height(len(layers)))


def _drawn(found: Figures | None, metric: Metric) -> float | None:
    """Return the value of a cell; None where it is grey or there is no such tensor."""
    return metric.value(found) if found and found.relative_l2 != 0 else None


def coloured(values: Sequence[Sequence[float | None]], metric: Metric) -> dict[str, Any]:
    """Return values, colours and colour bar of a map."""
    known = [v for row in values for v in row if v is not None]
    bar: dict[str, Any] = {"title": {"text": metric.label, "side": "right"}, "thickness": 14}
    if metric.diverging:
        reach = max((abs(v - 1) for v in known), default=0) or 1
        range_ = {"zmin": 1 - reach, "zmax": 1 + reach}
        return {"z": values, "colorscale": DIVERGING, "colorbar": bar, **range_}
    positive = [v for v in known if v > 0]
    if not positive or max(positive) < WIDE * min(positive):
        return {"z": values, "colorscale": SEQUENTIAL, "colorbar": bar}
    powers = [[log10(v) if v else None for v in row] for row in values]
    bar |= _ticks(log10(min(positive)), log10(max(positive)))
    return {"z": powers, "colorscale": SEQUENTIAL, "colorbar": bar}


def _ticks(low: float, high: float) -> dict[str, Any]:
    """Return ticks at 1, 2 and 5 times powers of ten; at powers only where there are many."""
    steps = (1, 2, 5) if high - low < FEW_DECADES else (1,)
    exponents = range(floor(low), ceil(high) + 1)
    ticks = [(log10(s) + e, f"{s * 10.0**e:g}") for e in exponents for s in steps]
    kept = [(at, text) for at, text in ticks if low - 0.01 <= at <= high + 0.01]
    return {"tickvals": [at for at, _ in kept], "ticktext": [text for _, text in kept]}


def _hover(layer: int, module: str, found: Figures | None) -> str:
    head = f"layer {layer}, {html.escape(module)}"
    if found is None:
        return f"{head}<br>nothing to compare"
    if found.relative_l2 == 0:
        return f"{head}<br>identical"
    rows = (
        ("relative L2", found.relative_l2), ("cosine", found.cosine),
        ("sign agreement", found.sign_agreement), ("norm ratio", found.norm_ratio),
        ("largest difference", found.max_abs),
    )  # fmt: skip
    return "<br>".join([head, *(f"{n} {'-' if v is None else f'{v:.6g}'}" for n, v in rows)])


def layer_lines(found: Difference) -> str:
    """Return the relative L2 of each layer, whole and by part, as HTML."""
    import plotly.graph_objects as go

    groups = found.layer_parts
    parts = [part for part in LINES if any(key[1] == part for key in groups)]
    layers = list(found.layers)
    figure = go.Figure()
    for part in ["whole layer", *parts]:
        whole = part == "whole layer"
        line = [found.layers.get(n) if whole else groups.get((n, part)) for n in layers]
        figure.add_scatter(
            x=layers,
            y=[group.figures.relative_l2 if group and group.figures else None for group in line],
            name=part,
            mode="lines+markers",
            line={"color": LINES[part], "width": 3 if whole else 1.5},
            marker={"size": 5},
        )
    figure.update_xaxes(title="layer", gridcolor=SAME, **numbered(layers))
    figure.update_yaxes(title="relative L2", gridcolor=SAME, rangemode="tozero", zeroline=False)
    figure.update_layout(legend={"orientation": "h", "y": 1.12}, hovermode="x unified")
    return piece(figure, "lines", height=340)


def numbered(layers: Sequence[int]) -> dict[str, Any]:
    """Return what an axis of layers needs: whole numbers only."""
    return {"zeroline": False, "tickformat": "d", "dtick": 1 if len(layers) <= FEW else None}


def map_height(layers: int) -> int:
    """Return the height of a map with so many rows, in pixels."""
    return 190 + max(150, layers * (22 if layers <= MANY else 12))


def piece(figure: Any, name: str, *, height: int) -> str:  # noqa: ANN401 - plotly is loaded late
    """Return a figure as HTML under an id, without the program that draws it."""
    figure.update_layout(
        height=height,
        margin={"l": 60, "r": 20, "t": 30, "b": 30},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12, "color": INK},
    )
    text: str = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        config={"displaylogo": False, "responsive": True, "displayModeBar": False},
    )
    return text
