"""The page of `surgery diff --html`: self-contained, complete, safe, whole or not at all."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch

from cli.main import main
from pairs import differ, layered, make_strangers, parent_and_child, shown, write


@pytest.fixture
def models(tmp_path):
    return parent_and_child(tmp_path)


class Loads(HTMLParser):
    """Collects whatever a page would load or embed, and its texts by element."""

    def __init__(self):
        super().__init__()
        self.loaded, self.data, self._in_data = [], "", False
        self.tags = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        named = dict(attrs)
        self.loaded += [named[key] for key in ("src", "href", "action", "data") if named.get(key)]
        self._in_data = named.get("id") == "data"

    def handle_endtag(self, tag):
        self._in_data = False

    def handle_data(self, data):
        self.data += data if self._in_data else ""


def page_of(out):
    parser = Loads()
    parser.feed(out.read_text(encoding="utf-8"))
    return parser


@pytest.fixture
def page(models, tmp_path, capsys):
    pytest.importorskip("plotly")
    out = tmp_path / "diff.html"
    shown(capsys, *models, "--html", out)
    return out


def test_the_page_loads_nothing_and_forbids_to(page):
    assert page_of(page).loaded == []
    assert "default-src 'none'" in page.read_text(encoding="utf-8")


def test_the_page_holds_every_figure_and_no_path(page, models, tmp_path):
    expected = json.loads(json.dumps(differ(*models).as_dict()))
    del expected["a"]["ref"], expected["b"]["ref"]
    assert json.loads(page_of(page).data) == expected
    assert str(tmp_path) not in page.read_text(encoding="utf-8")


def test_the_page_is_one_file_and_leaves_nothing_beside_it(page):
    assert sorted(path.name for path in page.parent.iterdir()) == [
        "child.safetensors", "diff.html", "parent.safetensors"
    ]  # fmt: skip


def test_the_page_draws_a_map_of_each_figure_and_the_layers(page):
    text = page.read_text(encoding="utf-8")
    for name in ("map-relative_l2", "map-cosine", "map-signs", "map-norm_ratio", "lines"):
        assert f'id="{name}"' in text
    assert "mlp.experts.*.up" in text


@pytest.mark.parametrize(("spread", "ticks"), [(0.0, False), (3.0, True)], ids=["even", "wide"])
def test_changes_of_many_sizes_are_coloured_by_powers_of_ten(spread, ticks, tmp_path):
    pytest.importorskip("plotly")
    from surgery.charts import METRICS, heat_map

    a = layered()
    b = {n: t * (1 + 10 ** (-spread * ("layers.0" in n)) / 9) for n, t in a.items()}
    one, two = write(tmp_path / "a.safetensors", a), write(tmp_path / "b.safetensors", b)
    assert ("ticktext" in heat_map(differ(one, two), METRICS[0])) is ticks


def test_the_same_comparison_gives_the_same_page(page, models, tmp_path, capsys):
    again = tmp_path / "again.html"
    shown(capsys, *models, "--html", again)
    assert again.read_bytes() == page.read_bytes()


def test_names_cannot_put_code_into_the_page(tmp_path, capsys):
    pytest.importorskip("plotly")
    evil = "model.layers.0.</script><img src=x onerror=alert(1)>.weight"
    a = write(tmp_path / "a.safetensors", {evil: torch.ones(2), "<b>only": torch.ones(1)})
    b = write(tmp_path / "b.safetensors", {evil: torch.zeros(2)})
    out = tmp_path / "diff.html"
    shown(capsys, a, b, "--html", out)
    parser = page_of(out)
    assert "img" not in parser.tags
    assert parser.loaded == []
    assert evil in json.loads(parser.data)["tensors"][0]["name"]


def test_without_layers_the_page_has_tables_only(tmp_path, capsys):
    pytest.importorskip("plotly")
    a = write(tmp_path / "a.safetensors", {"t": torch.ones(2)})
    out = tmp_path / "diff.html"
    shown(capsys, a, a, "--html", out)
    text = out.read_text(encoding="utf-8")
    assert len(text) < 50_000
    assert "All 1 tensors have the same bytes." in text


def test_a_page_is_replaced_with_force_only(page, models, capsys):
    page.write_text("mine")
    assert main(["diff", *map(str, models), "--html", str(page)]) == 1
    assert page.read_text() == "mine"
    shown(capsys, *models, "--html", page, "--force")
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_without_plotly_nothing_is_read(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("surgery.charts.find_spec", lambda _: None)
    monkeypatch.setattr("cli.diff.open_checkpoint", lambda *_, **__: pytest.fail("opened"))
    assert main(["diff", *map(str, models), "--html", str(tmp_path / "x.html")]) == 2
    assert "pip install 'model-surgery[html]'" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_leaves_nothing(models, tmp_path, monkeypatch, capsys):
    def full(_):
        raise OSError(28, "No space left on device")

    pytest.importorskip("plotly")
    monkeypatch.setattr("surgery.report_page.os.fsync", full)
    before = sorted(tmp_path.iterdir())
    assert main(["diff", *map(str, models), "--html", str(tmp_path / "x.html")]) == 1
    assert "No space left" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--virtual-time-budget=10000",
)  # fmt: skip


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_draws_the_page(page, tmp_path):
    words = [CHROMIUM, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [*words, page.as_uri()], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.count('class="heatmaplayer') == 4
    assert done.stdout.count('class="scatterlayer') >= 1
    assert ">mlp.experts.*.up</text>" in done.stdout


def test_what_is_apart_is_in_the_page(tmp_path, capsys):
    pytest.importorskip("plotly")
    out = tmp_path / "diff.html"
    shown(capsys, *make_strangers(tmp_path), "--html", out)
    text = out.read_text(encoding="utf-8")
    for words in ("Differ, but were not measured", "Of another shape", "Only in b", "extra29"):
        assert words in text
