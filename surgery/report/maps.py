"""Layer heat maps: how far weights moved, and how alike the layers' outputs are."""

import html
from collections.abc import Iterator, Sequence

from surgery.charts import METRICS, SAME, SEQUENTIAL, coloured, map_height, numbered, piece
from surgery.report.blocks import Block, Chart, Heading, Section, choose, shown
from surgery.report.fields import Fields
from surgery.report.measured import Pair, Run

WEIGHTS = (
    "Relative L2 of each module of each layer: the length of the change over the length of the "
    "parent's weights. Grey cells are identical."
)
LAYERS = (
    "Debiased linear CKA between the residual streams, every layer of the child beside every "
    "layer of the parent; place 0 is the input of the first layer. A figure near 1 does not show "
    "that a model works."
)


def weights(runs: Sequence[Run]) -> Section:
    """Return a map of weight distances for each pair."""
    return Section("weights", "Weights, by layer and module", _maps(runs, "weights"), WEIGHTS)


def similarity(runs: Sequence[Run]) -> Section:
    """Return a map of CKA for each pair."""
    return Section("similarity", "Layers, by what they compute", _maps(runs, "similarity"), LAYERS)


def _maps(runs: Sequence[Run], key: str) -> list[Block]:
    blocks: list[Block] = []
    for run in runs:
        charts = [
            (pair.label, chart)
            for i, pair in enumerate(run.pairs())
            if (chart := _drawn(pair, key, f"{run.number}-{i}")) is not None
        ]
        if charts:
            blocks += [Heading(run.name)] if run.name else []
            blocks += choose(f"{key}-maps-{run.number}", charts)
    return blocks


def _drawn(pair: Pair, key: str, name: str) -> Chart | None:
    found = pair.fields.one(key)
    if found is None:
        return None
    if key == "weights":
        return _distances(found, f"distance-{name}")
    return _alike(found, pair, f"cka-{name}")


def _cells(found: Fields) -> Iterator[tuple[int, str, Fields]]:
    for cell in found.each("cells"):
        layer, module = cell.number("layer"), cell.text("module")
        if layer is not None and module is not None:
            yield int(layer), module, cell


def _distances(found: Fields, name: str) -> Chart | None:
    import plotly.graph_objects as go

    cells = {(layer, module): cell for layer, module, cell in _cells(found)}
    if not cells:
        return None
    layers = sorted({layer for layer, _ in cells})
    modules = list(dict.fromkeys(module for _, module in cells))
    grid = [[cells.get((layer, module)) for module in modules] for layer in layers]
    values = [[cell.number("relative_l2") if cell else None for cell in row] for row in grid]
    place = {
        "x": [html.escape(module) for module in modules],
        "y": layers,
        "xgap": 1,
        "ygap": 1,
        "hoverinfo": "text",
        "hovertext": [
            [_hover(layer, module, cells.get((layer, module))) for module in modules]
            for layer in layers
        ],
    }
    same = [[0 if value == 0 else None for value in row] for row in values]
    moved = [[value or None for value in row] for row in values]
    grey = go.Heatmap(z=same, colorscale=[[0, SAME], [1, SAME]], showscale=False, **place)
    figure = go.Figure([grey, go.Heatmap(**coloured(moved, METRICS[0]), **place)])
    figure.update_xaxes(side="top", tickangle=-40, type="category", showgrid=False)
    figure.update_yaxes(autorange="reversed", title="layer", showgrid=False, **numbered(layers))
    return Chart(piece(figure, name, height=map_height(len(layers))))


def _hover(layer: int, module: str, cell: Fields | None) -> str:
    head = f"layer {layer}, {html.escape(module)}"
    if cell is None:
        return f"{head}<br>nothing to compare"
    keys = ("relative_l2", "cosine", "sign_agreement", "norm_ratio")
    told = (f"{key.replace('_', ' ')} {shown(cell.number(key), '.6g')}" for key in keys)
    return "<br>".join([head, *told])


def _alike(found: Fields, pair: Pair, name: str) -> Chart | None:
    import plotly.graph_objects as go

    matrix = found.grid("matrix")
    if not matrix or not matrix[0]:
        return None
    hover = [
        [f"child {i}, parent {j}<br>CKA {shown(value, '.4f')}" for j, value in enumerate(row)]
        for i, row in enumerate(matrix)
    ]
    bar = {"title": {"text": "CKA", "side": "right"}, "thickness": 14}
    drawn = go.Heatmap(
        z=matrix, zmin=0, zmax=1, colorscale=SEQUENTIAL, colorbar=bar, hovertext=hover,
        hoverinfo="text", xgap=1, ygap=1,
    )  # fmt: skip
    figure = go.Figure(drawn)
    across, down = list(range(len(matrix[0]))), list(range(len(matrix)))
    title = f"layer of {html.escape(pair.parent)}"
    figure.update_xaxes(title=title, showgrid=False, **numbered(across))
    title = f"layer of {html.escape(pair.child)}"
    figure.update_yaxes(autorange="reversed", title=title, showgrid=False, **numbered(down))
    return Chart(piece(figure, name, height=map_height(len(down))))
