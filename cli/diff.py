"""`surgery diff`: how two checkpoints differ."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from cli import render
from cli.heatmap import show_heat_map
from cli.writing import parse_size
from surgery.checkpoint import open_checkpoint
from surgery.comparing import compare
from surgery.difference import Difference, Group, Side, TensorDifference
from surgery.errors import RecipeError
from surgery.sums import Figures
from surgery.survey.layers import ranges

A_SIDE = "A directory, a .safetensors file, or org/name[@rev]."
FIGURES = ("relative L2", "cosine", "signs", "norm ratio", "largest", "equal")
ALL = "all"
NUMBERS = re.compile(r"(?<=\.)[0-9]{1,7}(?=\.)")
BRACES = str.maketrans({"{": "{{", "}": "}}"})
NAMED = 20  # lines of tensors that only one side has


def command(
    a: Annotated[str, typer.Argument(metavar="A", help=A_SIDE)],
    b: Annotated[str, typer.Argument(metavar="B", help="What to compare with A.")],
    *,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with charts too.")
    ] = None,
    tensors: Annotated[
        str, typer.Option(metavar="N|all", help="How many tensors to list, the most changed first.")
    ] = "10",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE of --html.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, max=256, help="Threads.  [default: by cores]")
    ] = None,
    memory: Annotated[str, typer.Option(help="Memory to hold at most, such as 512M or 4G.")] = "1G",
    allow_download: Annotated[
        bool, typer.Option("--allow-download", help="Fetch a hub model that is not in the cache.")
    ] = False,
) -> None:
    """Compare two checkpoints, tensor by tensor and layer by layer.

    Relative L2 is the length of B - A over the length of A. Files are streamed: memory does not
    grow with the models.
    """
    listed = _count(tensors)
    limit = parse_size(memory, "--memory")
    if html:
        from surgery.charts import require_plotly

        require_plotly()
    sides = [open_checkpoint(ref, allow_download=allow_download) for ref in (a, b)]
    if html:
        from surgery.report_page import check_page

        check_page(html, force=force, inputs=[file for side in sides for file in side.files])
    with render.progress("comparing") as progress:
        found = compare(*sides, workers=workers, memory=limit, progress=progress)
    if html:
        from surgery.report_page import difference_page, write_page

        write_page(difference_page(found), html)
    if as_json:
        render.print_json(found.as_dict())
        return
    _show(found, listed)
    if html:
        render.remark(f"wrote {html}")


def _count(text: str) -> int | None:
    """Return how many tensors to list, None for all."""
    if text == ALL:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise RecipeError(f"--tensors {text}", "is not a number", f"write 20, or {ALL}")
    return int(text)


def _show(found: Difference, listed: int | None) -> None:
    render.line(f"A  {_side(found.a)}", "bold")
    render.line(f"B  {_side(found.b)}", "bold")
    render.line(_verdict(found))
    if found.tensors and not found.is_identical:
        _show_groups(found)
        show_heat_map(found)
        _show_tensors(found, listed)
    _show_apart(found)
    for note in found.notes:
        render.line(f"note: {note}", "yellow")


def _side(side: Side) -> str:
    family = f"  {side.family}" if side.family != "unknown" else ""
    held = f"{render.quantity(side.parameters)} parameters"
    return f"{side.ref}{family}  {side.tensors} tensors, {held}, {', '.join(side.dtypes)}"


def _verdict(found: Difference) -> str:
    if found.is_identical:
        return f"identical: all {len(found.tensors)} tensors have the same bytes"
    told = [f"{len(found.tensors)} in both, {found.total.identical} of them identical"]
    apart = (
        (len(found.only_in_a), "only in A"),
        (len(found.only_in_b), "only in B"),
        (len(found.mismatched), "of another shape"),
        (found.total.unmeasured, "differ, but cannot be measured"),
    )
    return ", ".join([*told, *(f"{count} {what}" for count, what in apart if count)])


def _show_groups(found: Difference) -> None:
    tables: dict[str, Iterable[tuple[object, Group]]] = {
        "part": [*found.parts.items(), ("all", found.total)],
        "layer": found.layers.items(),
    }
    for heading, groups in tables.items():
        rows = [(name, g.tensors, g.identical, *_cells(g.figures)) for name, g in groups]
        if rows:
            render.gap()
            headings = (heading, "tensors", "identical", *FIGURES)
            render.table(headings, rows, numbers=range(1, len(headings)))


def _cells(found: Figures | None) -> tuple[str, ...]:
    if found is None:
        return ("-",) * len(FIGURES)
    near_one = (found.cosine, found.sign_agreement, found.norm_ratio)
    rounded = (_near_one(value) for value in near_one)
    return (*_three(found.relative_l2), *rounded, *_three(found.max_abs), _share(found.equal))


def _three(value: float | None) -> tuple[str]:
    return ("-" if value is None else f"{value:.3g}",)


def _near_one(value: float | None) -> str:
    """Show six decimals, but 1 only where it is 1."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value in (0, 1, -1) else f"{value:.6f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _show_tensors(found: Difference, listed: int | None) -> None:
    chosen = list(found.tensors) if listed is None else found.most_changed(listed)
    if not chosen:
        return
    render.gap()
    rows = [(t.name, dtypes(t), *_cells(t.figures)) for t in chosen]
    title = "tensors" if listed is None else "most changed tensors"
    render.table((title, "dtype", *FIGURES), rows, numbers=range(2, 8))


def dtypes(tensor: TensorDifference) -> str:
    """Name the dtype, or both where they differ."""
    return ", ".join(dict.fromkeys((tensor.dtype_a, tensor.dtype_b)))


def _show_apart(found: Difference) -> None:
    unmeasured = [t for t in found.tensors if t.state == "differs"]
    if unmeasured:
        render.gap()
        render.table(
            ("differs, not measured", "why"), [(t.name, t.note) for t in unmeasured[:NAMED]]
        )
        _more(len(unmeasured) - NAMED)
    if found.mismatched:
        render.gap()
        shapes = [(m.name, list(m.shape_a), list(m.shape_b)) for m in found.mismatched[:NAMED]]
        render.table(("of another shape", "A", "B"), shapes)
        _more(len(found.mismatched) - NAMED)
    for side, names in (("A", found.only_in_a), ("B", found.only_in_b)):
        if names:
            render.gap()
            rows = collapse(names)
            render.table((f"only in {side}", "tensors"), rows[:NAMED], numbers=(1,))
            _more(len(rows) - NAMED)


def _more(left: int) -> None:
    if left > 0:
        render.line(f"and {left} more (--json lists them)", "dim")


def collapse(names: Iterable[str]) -> list[tuple[str, int]]:
    """Write names that differ in their numbers alone as one, `layers.{0-3, 7}.mlp`, and count.

    The names that stand for most come first.
    """
    found: dict[str, list[list[int]]] = {}
    for name in names:
        numbers = [int(number) for number in NUMBERS.findall(name)]
        found.setdefault(NUMBERS.sub("{}", name.translate(BRACES)), []).append(numbers)
    return [
        (form.format(*map(_numbers, zip(*rows, strict=True))), len(rows))
        for form, rows in sorted(found.items(), key=lambda item: -len(item[1]))
    ]


def _numbers(numbers: Sequence[int]) -> str:
    distinct = sorted(set(numbers))
    return str(distinct[0]) if len(distinct) == 1 else f"{{{ranges(distinct)}}}"
