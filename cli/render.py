"""All that is drawn: tables, progress bars, sizes. Plain when piped, rich when a person looks."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from surgery.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

# Blocks that fill a cell by eighths, from the left.
EIGHTHS = ("", *"\u258f\u258e\u258d\u258c\u258b\u258a\u2589\u2588")
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


def is_watched(*, stderr: bool = False) -> bool:
    """Whether a person looks at a stream; where nobody does, rich is not even loaded."""
    stream = sys.stderr if stderr else sys.stdout
    return stream.isatty() or bool(os.environ.get("FORCE_COLOR"))


def print_json(document: object) -> None:
    """Print one JSON object on stdout; what UTF-8 cannot hold is escaped."""
    text = json.dumps(document, indent=2, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:  # a path that is not UTF-8, a lone surrogate in a record
        text = json.dumps(document, indent=2, default=str)
    sys.stdout.write(text + "\n")


def line(text: str = "", style: str | None = None) -> None:
    """Print one line of the result; control characters in it are escaped."""
    if is_watched():
        out().print(printable(text), style=style, markup=False)
    else:
        sys.stdout.write(printable(text) + "\n")


def remark(text: str) -> None:
    """Print one line beside the result, on stderr."""
    if is_watched(stderr=True):
        err().print(printable(text), style="dim", markup=False)
    else:
        sys.stderr.write(printable(text) + "\n")


def warn(text: str) -> None:
    """Print one line on stderr that is not to be overlooked."""
    if is_watched(stderr=True):
        err().print(printable(text), style="bold yellow", markup=False)
    else:
        sys.stderr.write(printable(text) + "\n")


def gap() -> None:
    """Print an empty line between tables when piped; on a terminal tables bring their own."""
    if not is_watched():
        sys.stdout.write("\n")


def pairs(rows: Sequence[tuple[str, str]]) -> None:
    """Print names and what is told of them, one a line; the names dim on a terminal."""
    width = max((len(name) for name, _ in rows), default=0)
    if not is_watched():
        for name, told in rows:
            sys.stdout.write(f"  {printable(name.ljust(width))}  {printable(told)}\n")
        return
    from rich.text import Text

    for name, told in rows:
        shown = Text(f"  {name.ljust(width)}  ", style="dim").append(printable(told), "not dim")
        out().print(shown)


def share_bar(share: float, cells: int) -> tuple[str, ...]:
    """Return a bar of at most so many cells for a terminal; nothing when piped."""
    if not is_watched():
        return ()
    whole, eighths = divmod(round(share * cells * 8), 8)
    return (EIGHTHS[-1] * whole + EIGHTHS[eighths],)


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    numbers: Sequence[int] = (),
    title: str | None = None,
    styles: Mapping[int, str] | None = None,
) -> None:
    """Print a table: ruled on a terminal, aligned columns when piped.

    Args:
        numbers: the columns that align right.
        title: a line above the table.
        styles: how columns look on a terminal.
    """
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    if not is_watched():
        _plain_table(headings, cells, numbers, title)
        return
    from rich import box
    from rich.table import Table

    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, heading in enumerate(headings):
        side: Literal["right", "left"] = "right" if i in numbers else "left"
        style = styles.get(i) if styles else None
        drawn.add_column(heading, justify=side, overflow="fold", style=style)
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
def progress(what: str, *, counted: bool = False) -> Iterator[Report | None]:
    """Draw a bar on stderr while a run works, of bytes or `counted` things; none unwatched."""
    if not is_watched(stderr=True):
        yield None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amount = (MofNCompleteColumn(),) if counted else (DownloadColumn(), TransferSpeedColumn())
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        *amount,
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
