"""All that is drawn: tables, progress bars, sizes. Plain when piped, rich when a person looks."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from surgery.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

Report = Callable[[int, int], None]


@cache
def _console(*, stderr: bool) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def out() -> "Console":
    """Return the console of results (stdout)."""
    return _console(stderr=False)


def err() -> "Console":
    """Return the console of progress and remarks (stderr)."""
    return _console(stderr=True)


def print_json(document: object) -> None:
    """Print one JSON object on stdout."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n")


def line(text: str = "", style: str | None = None) -> None:
    """Print one line of the result; control characters in it are escaped."""
    out().print(printable(text), style=style, markup=False)


def remark(text: str) -> None:
    """Print one line beside the result, on stderr."""
    err().print(printable(text), style="dim", markup=False)


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    numbers: Sequence[int] = (),
    title: str | None = None,
) -> None:
    """Print a table: ruled on a terminal, aligned columns when piped.

    Args:
        numbers: the columns that align right.
        title: a line above the table.
    """
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    if not out().is_terminal:
        _plain_table(headings, cells, numbers, title)
        return
    from rich import box
    from rich.table import Table

    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(headings):
        drawn.add_column(heading, justify="right" if i in numbers else "left", overflow="fold")
    for row in cells:
        drawn.add_row(*(_text(cell) for cell in row))
    out().print(drawn)


def _text(cell: str) -> Any:  # noqa: ANN401 - rich is loaded late
    from rich.text import Text

    return Text(cell)


def _plain_table(
    headings: Sequence[str],
    cells: Sequence[Sequence[str]],
    numbers: Sequence[int],
    title: str | None,
) -> None:
    rows = [list(headings), *cells]
    widths = [max(len(row[i]) for row in rows) for i in range(len(headings))]
    if title:
        sys.stdout.write(f"{title}\n")
    for row in rows:
        padded = [
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        sys.stdout.write("  ".join(padded).rstrip() + "\n")


@contextmanager
def progress(what: str) -> Iterator[Report | None]:
    """Draw a bar of bytes on stderr while a run works; nothing when nobody looks."""
    if not err().is_terminal:
        yield None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err(), transient=True) as bar:
        task = bar.add_task(what, total=None)

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield report


def size(count: float) -> str:
    """Return bytes with a unit, three digits: `1.40 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:  # noqa: PLR2004 - SI units
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def quantity(count: float) -> str:
    """Return a count with a unit: `701.6 M`."""
    for unit in ("", " k", " M", " B"):
        if abs(count) < 1000:  # noqa: PLR2004 - SI units
            return f"{count:.0f}" if not unit else f"{count:.4g}{unit}"
        count /= 1000
    return f"{count:.4g} T"
