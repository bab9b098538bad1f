"""One self-contained web page that shows how two checkpoints differ."""

import html
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from surgery.charts import METRICS, heat_map, layer_lines, plotly_program
from surgery.difference import Difference, Group, Side
from surgery.errors import PlanError
from surgery.page_style import STYLE, SWITCH
from surgery.provenance import tool_version
from surgery.sums import Figures

# The browser itself sees to it that the page loads nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
ROWS = 200  # tensors in the table; the data in the page holds all

MEANING = (
    ("relative L2", "length of the change B - A over the length of A; 0 is no change"),
    ("cosine", "of the angle between A and B as vectors; 1 is the same direction"),
    ("sign agreement", "share of elements that have the same sign"),
    ("norm ratio", "length of B over length of A"),
    ("largest difference", "of any one element"),
    ("equal", "share of elements with the same value"),
)


def difference_page(found: Difference) -> str:
    """Return the whole page; it loads nothing from anywhere."""
    title = f"{found.b.name} against {found.a.name}"
    body = [
        f"<h1>{_text(found.b.name)} <span class=soft>against</span> {_text(found.a.name)}</h1>",
        f"<p>{_text(_sentence(found))}</p>",
        _cards(found),
        _both(found),
        *(_maps(found) if found.layers else ()),
        "<h2>Parts of the model</h2>",
        _groups("part", found.parts.items()),
        *_layer_table(found),
        *_tensor_table(found),
        *_apart(found),
        _meaning(),
        f"<footer>Made by surgery {_text(tool_version())}. The figures of every tensor are in "
        "this file, as JSON under the id <code>data</code>.</footer>",
        f'<script type="application/json" id="data">{_json(found)}</script>',
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n"
        + (f"<script>{plotly_program()}</script>\n" if found.layers else "")
        + "</head>\n<body>\n"
        + "\n".join(body)
        + f"\n<script>{SWITCH}</script>\n</body>\n</html>\n"
    )


def check_page(out: Path, *, force: bool, inputs: Iterable[Path]) -> None:
    """Make sure that a page may be written to `out`, before any work is done.

    Args:
        force: replace a file that stands there.
        inputs: files that must not be replaced, whatever is forced.

    Raises:
        PlanError: it may not, or could not.
    """
    if out.is_dir():
        raise PlanError(out, "is a directory", "name a file, such as diff.html")
    if not out.parent.is_dir():
        raise PlanError(out, "lies in a directory that does not exist", "make it first")
    if not os.access(out.parent, os.W_OK):
        raise PlanError(out, "lies in a directory that cannot be written to")
    if os.path.lexists(out) and not force:
        raise PlanError(out, "exists", "choose another name, or replace it with --force")
    if out.exists() and any(out.samefile(path) for path in inputs):
        raise PlanError(out, "is one of the inputs", "choose another name")


def write_page(page: str, out: Path) -> None:
    """Put a page at `out`, whole or not at all.

    Raises:
        PlanError: the disk refuses.
    """
    part = out.with_name(f".{out.name}.surgery-partial-{os.getpid()}")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        part.replace(out)
    except OSError as error:
        raise PlanError(out, f"cannot be written ({error.strerror})") from error
    finally:
        with suppress(OSError):
            part.unlink()


def _text(value: object) -> str:
    return html.escape(str(value))


def _json(found: Difference) -> str:
    """Return JSON that cannot end the script element that it stands in; a page tells no paths."""
    told = found.as_dict()
    for side in (told["a"], told["b"]):
        del side["ref"]
    return json.dumps(told, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e")


def _sentence(found: Difference) -> str:
    if found.is_identical:
        return f"All {len(found.tensors)} tensors have the same bytes."
    total = found.total
    told = [f"{len(found.tensors)} tensors in both, {total.identical} of them identical"]
    told += [f"{len(found.only_in_a)} only in {found.a.name}"] if found.only_in_a else []
    told += [f"{len(found.only_in_b)} only in {found.b.name}"] if found.only_in_b else []
    told += [f"{len(found.mismatched)} of another shape"] if found.mismatched else []
    return "; ".join(told) + "."


def _cards(found: Difference) -> str:
    total = found.total.figures
    if total is None:
        return ""
    rows = (
        ("relative L2", total.relative_l2), ("cosine", total.cosine),
        ("sign agreement", total.sign_agreement), ("norm ratio", total.norm_ratio),
        ("largest difference", total.max_abs), ("elements equal", total.equal),
    )  # fmt: skip
    cards = (f"<div class=card><b>{_number(v)}</b><span>{n}</span></div>" for n, v in rows)
    return f"<div class=cards>{''.join(cards)}</div>"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def _maps(found: Difference) -> Iterable[str]:
    yield "<h2>Layers and modules</h2>"
    yield "<p>Grey cells are identical; where there is no cell, there is nothing to compare.</p>"
    tabs = (
        f'<input type=radio name=metric id="tab-{m.key}" value="{m.key}"{" checked" * (i == 0)}>'
        f'<label for="tab-{m.key}">{_text(m.label)}</label>'
        for i, m in enumerate(METRICS)
    )
    yield f"<div class=tabs>{''.join(tabs)}</div>"
    for i, metric in enumerate(METRICS):
        hidden = " hidden" if i else ""
        yield f'<div class=pane data-key="{metric.key}"{hidden}>{heat_map(found, metric)}</div>'
    yield "<h2>Change by layer</h2>"
    yield layer_lines(found)


COLUMNS = ("relative L2", "cosine", "sign agreement", "norm ratio", "largest difference", "equal")


def _figures(found: Figures | None) -> list[str]:
    if found is None:
        return ["-"] * len(COLUMNS)
    values = (found.relative_l2, found.cosine, found.sign_agreement, found.norm_ratio)
    return [_number(value) for value in (*values, found.max_abs, found.equal)]


def _table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{_text(heading)}</th>" for heading in headings)
    body = "".join(
        f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>\n" for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class=scroll tabindex=0>{table}</div>"


def _groups(heading: str, groups: Iterable[tuple[object, Group]]) -> str:
    rows = [
        (name, group.tensors, group.identical, *_figures(group.figures)) for name, group in groups
    ]
    return _table((heading, "tensors", "identical", *COLUMNS), rows)


def _layer_table(found: Difference) -> Iterable[str]:
    if found.layers:
        yield "<h2>Layers</h2>"
        yield f"<details><summary>{len(found.layers)} layers, each as one vector</summary>"
        yield _groups("layer", found.layers.items())
        yield "</details>"


def _tensor_table(found: Difference) -> Iterable[str]:
    changed = found.most_changed(ROWS)
    if not changed:
        return
    yield "<h2>Tensors, the most changed first</h2>"
    yield f"<details open><summary>{len(changed)} of {len(found.tensors)} in both</summary>"
    rows = [
        (t.name, _dtypes(t.dtype_a, t.dtype_b), _shape(t.shape), *_figures(t.figures))
        for t in changed
    ]
    yield _table(("tensor", "dtype", "shape", *COLUMNS), rows)
    yield "</details>"


def _dtypes(a: str, b: str) -> str:
    return a if a == b else f"{a}, {b}"


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _apart(found: Difference) -> Iterable[str]:
    """Tell what has no figures."""
    unmeasured = [(t.name, t.note) for t in found.tensors if t.state == "differs"]
    if unmeasured:
        yield "<h2>Differ, but were not measured</h2>" + _table(("tensor", "why"), unmeasured)
    if found.mismatched:
        rows = [(m.name, _shape(m.shape_a), _shape(m.shape_b)) for m in found.mismatched]
        headings = ("tensor", f"in {found.a.name}", f"in {found.b.name}")
        yield "<h2>Of another shape</h2>" + _table(headings, rows)
    for side, names in ((found.a, found.only_in_a), (found.b, found.only_in_b)):
        if names:
            listed = _table(("tensor",), ((name,) for name in names))
            head = f"<h2>Only in {_text(side.name)}</h2>"
            yield f"{head}<details><summary>{len(names)} tensors</summary>{listed}</details>"


def _both(found: Difference) -> str:
    sides = [
        (label, s.name, s.family, s.tensors, f"{s.parameters:,}", f"{s.bytes:,}", _joined(s))
        for label, s in (("A", found.a), ("B", found.b))
    ]
    headings = ("", "name", "family", "tensors", "parameters", "bytes", "dtypes")
    notes = "".join(f"<p>{_text(note)}</p>" for note in found.notes)
    return f"{_table(headings, sides)}{notes}"


def _joined(side: Side) -> str:
    return ", ".join(side.dtypes)


def _meaning() -> str:
    rows = "".join(f"<dt><b>{name}</b></dt><dd>{told}</dd>" for name, told in MEANING)
    return f"<h2>What the figures mean</h2><dl class=soft>{rows}</dl>"
