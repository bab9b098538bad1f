"""A page in a real browser: no error, and the chart of each section is drawn."""

from __future__ import annotations

import pytest

from reported import HOSTILE, TAME, save_everything

SECTIONS = [
    "quality", "gates", "tasks", "pareto", "curves", "weights", "similarity", "samples", "lineage",
]  # fmt: skip
CHARTS = {
    "matrix-0-0", "matrix-0-1", "matrix-0-2", "scores-0-0", "lineage-graph", "curve-loss",
    "curve-parts", "curve-lr", "curve-gradient_norm", "curve-tokens_per_second",
    *(f"distance-0-{i}" for i in range(4)), *(f"cka-0-{i}" for i in range(4)),
    *(f"front-0-{key}" for key in (
        "parameters", "decode_per_second", "prefill_per_second", "decode_peak", "cache_per_token")),
}  # fmt: skip


@pytest.mark.parametrize("word", [TAME, HOSTILE], ids=["tame", "hostile"])
def test_every_chart_is_drawn_without_an_error(word, report, browse, tmp_path):
    told, complaints = browse(report(*save_everything(tmp_path / "runs", word)))
    assert complaints == []
    assert told["sections"] == SECTIONS
    assert set(told["charts"]) == CHARTS
    assert [name for name, drawn in told["charts"].items() if not drawn] == []
    assert told["title"] == "Report"
    assert (told["images"], told["bold"]) == (0, 0)


def test_a_tab_shows_its_chart_alone(report, browse, tmp_path):
    told, _ = browse(report(*save_everything(tmp_path / "runs")))
    counts = [3, 5, 5, 4, 4]  # of texts, costs, figures of a curve, pairs twice
    assert told["seen"] == [str(i) for count in counts for i in range(count)]


def test_the_browser_does_tell_of_errors_and_forbidden_loads(browse, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<html><body><script>missing()</script></body></html>")
    assert "missing is not defined" in browse(page)[1][0]
