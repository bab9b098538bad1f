"""The lineage as a picture, and the recipe of each model in it."""

import html
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from surgery.charts import INK, LINES, piece
from surgery.report.blocks import Block, Chart, Folded, Section, Table, Text
from surgery.report.fields import named
from surgery.report.lineage import Ancestor, Lineage
from surgery.report.measured import labelled, short

LONG = 24  # members of a list in a recipe; of longer ones the first are shown
DEEP = 20  # levels of a recipe; the first are shown
ROW = 64  # pixels between models of a generation
ABOUT = (
    "From left to right; a dotted line leads from a teacher to what learnt its answers. Inputs "
    "are followed as far as they still lie where they were."
)
COLOURS = {"made": LINES["attention"], "origin": INK}


def pedigree(lineage: Lineage) -> Section:
    """Return where models come from, and how each was made."""
    if not lineage.made:
        return Section("lineage", "Recipes and lineage", [])
    models = list(lineage.models.values())
    names = labelled([(m.name, named(m.key)) for m in models])
    labels = {model.key: name for model, name in zip(models, names, strict=True)}
    blocks: list[Block] = [Chart(_picture(lineage, labels))]
    if not lineage.complete:
        blocks.append(Text("There are more models than are shown."))
    blocks.append(_table(lineage, labels))
    blocks += [Folded(f"Recipe of {labels[m.key]}", _recipe(m)) for m in lineage.made]
    return Section("lineage", "Recipes and lineage", blocks, ABOUT)


def places(lineage: Lineage) -> dict[str, tuple[int, float]]:
    """Return each model's generation, and its height: those of a generation are centred."""
    generations = lineage.generations()
    counts = Counter(generations.values())
    seen = Counter[int]()
    found = {}
    for key, generation in generations.items():
        found[key] = (generation, seen[generation] - (counts[generation] - 1) / 2)
        seen[generation] += 1
    return found


def _picture(lineage: Lineage, labels: Mapping[str, str]) -> str:
    import plotly.graph_objects as go

    at = places(lineage)
    figure = go.Figure()
    for model in lineage.models.values():
        for dash, keys in (("solid", model.inputs), ("dot", model.teachers)):
            for key in keys:
                _arrow(figure, at[key], at[model.key], dash) if key in at else None
    models = list(lineage.models.values())
    figure.add_scatter(
        x=[at[model.key][0] for model in models],
        y=[at[model.key][1] for model in models],
        text=[_caption(model, labels[model.key]) for model in models],
        mode="markers+text",
        textposition="bottom center",
        hoverinfo="text",
        cliponaxis=False,
        marker={
            "size": 16,
            "color": [COLOURS["made" if model.record else "origin"] for model in models],
        },
    )
    deep = max(place[0] for place in at.values())
    high = max(abs(place[1]) for place in at.values())
    hidden = {"visible": False, "showgrid": False, "zeroline": False}
    figure.update_xaxes(range=[-0.5, deep + 0.5], **hidden)
    figure.update_yaxes(range=[high + 0.8, -high - 0.5], **hidden)
    figure.update_layout(showlegend=False, hovermode="closest")
    return piece(figure, "lineage-graph", height=180 + int(2 * high * ROW))


def _arrow(figure: Any, start: Sequence[float], end: Sequence[float], dash: str) -> None:  # noqa: ANN401
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
    line = {"color": INK, "width": 1.5, "dash": dash}
    figure.add_scatter(
        x=[start[0], middle[0], end[0]],
        y=[start[1], middle[1], end[1]],
        mode="lines+markers",
        line=line,
        hoverinfo="skip",
        marker={"symbol": "arrow", "angleref": "previous", "size": [0, 11, 0], "color": INK},
    )


def _caption(model: Ancestor, label: str) -> str:
    made = f"<br><i>{html.escape(short(model.operation))}</i>" if model.operation else ""
    return f"{html.escape(label)}{made}"


def _table(lineage: Lineage, labels: Mapping[str, str]) -> Table:
    rows = [
        (
            labels[model.key],
            model.operation or "origin",
            _joined(labels.get(key, "-") for key in model.inputs),
            _joined(labels.get(key, "-") for key in model.teachers),
            _versions(model),
        )
        for model in lineage.models.values()
    ]
    return Table(("model", "made by", "of", "taught by", "with"), rows)


def _joined(words: Iterator[str]) -> str:
    return ", ".join(words) or "-"


def _versions(model: Ancestor) -> str:
    versions = model.record.some("versions").values if model.record else {}
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "-"


def _recipe(model: Ancestor) -> str:
    """Return how a model was made as JSON, without paths of a machine and without curves."""
    if model.record is None:
        return ""
    operation = model.record.text("operation") or "unknown"
    told: dict[str, Any] = {operation: model.record.some("parameters").values}
    facts = model.record.some("facts").values
    if facts and operation != "recover":  # whose parameters hold its facts
        told["facts"] = facts
    return json.dumps(_plain(told), indent=2, ensure_ascii=False)


def _plain(value: Any, depth: int = 0) -> Any:  # noqa: ANN401 - whatever JSON holds
    if isinstance(value, str):
        return named(value)
    if isinstance(value, dict | list) and depth == DEEP:
        return "..."
    if isinstance(value, dict):
        return {named(key): _plain(each, depth + 1) for key, each in value.items()}
    if isinstance(value, list):
        more = [f"and {len(value) - LONG} more"] if len(value) > LONG else []
        return [_plain(each, depth + 1) for each in value[:LONG]] + more
    return value
