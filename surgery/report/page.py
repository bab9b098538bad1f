"""The page: all sections that have something to show, in a template that escapes their text."""

from collections.abc import Iterator
from pathlib import Path

from surgery.charts import plotly_program
from surgery.page_style import STYLE
from surgery.provenance import tool_version
from surgery.report.blocks import Section
from surgery.report.curves import curves
from surgery.report.linearized import linearized
from surgery.report.maps import similarity, weights
from surgery.report.measured import Run
from surgery.report.pareto import pareto
from surgery.report.pedigree import pedigree
from surgery.report.quality import gates, quality
from surgery.report.reading import Collected
from surgery.report.samples import samples
from surgery.report.tasks import tasks

TEMPLATE = "page.html.jinja"


def sections(collected: Collected) -> Iterator[Section]:
    """Yield the sections of a page, those without data too."""
    alone = len(collected.evaluations) == 1
    runs = [Run.of(run, i, alone=alone) for i, run in enumerate(collected.evaluations)]
    yield quality(runs)
    yield gates(runs)
    yield tasks(runs)
    yield pareto(runs)
    yield linearized(collected)
    yield curves(collected)
    yield weights(runs)
    yield similarity(runs)
    yield samples(runs)
    yield pedigree(collected.lineage)


def report_page(collected: Collected) -> str:
    """Return the whole page; it loads nothing from anywhere.

    Raises:
        CheckpointError: a file that was read holds something of the wrong kind.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    shown = [section for section in sections(collected) if section.blocks]
    templates = FileSystemLoader(Path(__file__).parent)
    made = Environment(
        loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = made.get_template(TEMPLATE).render(
        title="Report",
        names=_names(collected),
        sections=shown,
        style=Markup(STYLE),  # noqa: S704 - our own
        program=Markup(plotly_program()),  # noqa: S704 - of the installed package
        safe=Markup,
        version=tool_version(),
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # JSON may hold half a character


def _names(collected: Collected) -> list[str]:
    """Return what the page was made of, by names that tell no path."""
    evaluations = [run.file.name for run in collected.evaluations]
    made = [model.name for model in collected.lineage.made]
    return [*evaluations, *made, *(run.path.resolve().name for run in collected.trainings)]
