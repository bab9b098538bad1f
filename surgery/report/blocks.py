"""What pages are made of; the template gives each kind its markup and escapes all but charts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True, slots=True)
class Chart:
    """What plotly has drawn, as HTML of its own."""

    kind: ClassVar[str] = "chart"
    html: str


@dataclass(frozen=True, slots=True)
class Choice:
    """Charts of which one is seen at a time.

    Attributes:
        name: unique on the page.
        charts: each with the label that selects it.
    """

    kind: ClassVar[str] = "choice"
    name: str
    charts: Sequence[tuple[str, Chart]]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells.

    Attributes:
        prose: cells hold text of several lines, not figures.
    """

    kind: ClassVar[str] = "table"
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    prose: bool = False


@dataclass(frozen=True, slots=True)
class Folded:
    """A text that keeps its lines, seen when its summary is opened."""

    kind: ClassVar[str] = "folded"
    summary: str
    text: str


@dataclass(frozen=True, slots=True)
class Heading:
    """The beginning of a part of a section."""

    kind: ClassVar[str] = "heading"
    text: str


Block = Text | Chart | Choice | Table | Folded | Heading


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page, left out where it has no blocks.

    Attributes:
        name: its id on the page.
    """

    name: str
    title: str
    blocks: Sequence[Block]
    about: str = ""


def choose(name: str, charts: Sequence[tuple[str, Chart]]) -> list[Block]:
    """Return charts to choose from; the only one without a choice."""
    if len(charts) > 1:
        return [Choice(name, charts)]
    return [chart for _, chart in charts]


def shown(value: float | None, form: str = ".5g", *, unit: str = "") -> str:
    """Return a figure for a cell; a dash where there is none."""
    return "-" if value is None else f"{value:{form}}{unit}"
