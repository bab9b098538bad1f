"""The page: self-contained, safe with any text, whole or not at all, only what there is."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from cli.main import main
from reported import (
    HOSTILE,
    TAME,
    evaluation,
    model,
    save_evaluation,
    save_everything,
    save_record,
    save_recovered,
    save_training,
)


class Elements(HTMLParser):
    """Collects the elements of a page, what they would load, sections, and texts of cells."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.loaded, self.sections, self.cells = [], [], [], []
        self._in_cell = False
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        named = dict(attrs)
        self.loaded += [named[key] for key in ("src", "action", "data") if named.get(key)]
        self.loaded += [] if (named.get("href") or "#").startswith("#") else [named["href"]]
        self.sections += [named["id"]] if tag == "section" else []
        self._in_cell = tag == "td"
        self.cells += [""] if self._in_cell else []

    def handle_endtag(self, tag):
        self._in_cell = self._in_cell and tag != "td"

    def handle_data(self, data):
        if self._in_cell:
            self.cells[-1] += data


def test_text_of_files_adds_no_element(report, tmp_path):
    pages = [
        Elements(report(*save_everything(tmp_path / name, word)))
        for name, word in (("a", TAME), ("b", HOSTILE))
    ]
    assert pages[0].tags == pages[1].tags
    assert pages[1].loaded == []
    assert HOSTILE in pages[1].cells


def test_the_page_tells_no_path(report, tmp_path):
    text = report(*save_everything(tmp_path / "runs")).read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    assert "default-src 'none'" in text


def test_figures_stand_in_the_tables(report, tmp_path):
    cells = Elements(report(*save_everything(tmp_path / "runs"))).cells
    for figure in ("0.0427", "+0.0400 to +0.0600", "3.2500", "3.1250", "80.0%", "holds"):
        assert figure in cells


BARE = {"tasks": [], "gates": []}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        pytest.param(
            lambda at: save_evaluation(at / "run.json", models=[model("a/b", 1.0)], **BARE),
            ["quality", "samples"],
            id="one model",
        ),
        pytest.param(lambda at: save_record(at / "made", at), ["lineage"], id="a record"),
        pytest.param(
            lambda at: save_recovered(at / "made", at, at),
            ["curves", "lineage"],
            id="a recovery",
        ),
        pytest.param(
            lambda at: save_training(at / "x.surgery-run"), ["curves"], id="a run that goes on"
        ),
    ],
)
def test_sections_without_data_are_left_out(make, expected, report, tmp_path):
    assert Elements(report(make(tmp_path))).sections == expected


def test_models_of_one_name_keep_apart(report, tmp_path):
    models = [model(ref, 1.0, size=size) for ref, size in (("a/x", 1), ("b/x", 2), ("b/x", 3))]
    cells = Elements(report(save_evaluation(tmp_path / "r.json", models=models, **BARE))).cells
    assert {"a/x", "b/x (1)", "b/x (2)"} <= set(cells)


def test_a_run_folder_is_taken_before_the_thinned_curve_of_its_model(report, tmp_path):
    healed = save_recovered(tmp_path / "m", tmp_path, tmp_path)
    folder = save_training(tmp_path / "m.surgery-run")
    cells = Elements(report(healed, folder)).cells
    assert "1.7000" in cells  # the last loss of the folder
    assert "1.5000" not in cells  # that of the record
    assert "3.1250" in cells  # held out, of the record


def test_half_a_character_and_a_deep_recipe_do_not_stop_the_page(report, tmp_path):
    deep = json.loads("[" * 400 + "]" * 400)
    made = save_record(tmp_path / "made", tmp_path, operation="\ud800", parameters={"x": deep})
    text = report(made).read_text(encoding="utf-8")
    assert "<td>?</td>" in text


def test_json_is_what_was_read(tmp_path, capsys):
    runs = save_everything(tmp_path / "runs")
    assert main(["report", *map(str, runs), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["evaluations"] == [{"path": str(runs[0]), **evaluation()}]
    assert [m["name"] for m in told["models"]] == ["healed", "student", "base"]
    assert [step["step"] for step in told["trainings"][0]["steps"]] == [0, 1, 2, 3]


@pytest.fixture
def asks(tmp_path, monkeypatch):
    """Files and folders that are wrong, one way each."""
    pytest.importorskip("plotly")
    monkeypatch.chdir(tmp_path)
    save_evaluation(tmp_path / "run.json")
    (tmp_path / "old.html").write_text("mine")
    (tmp_path / "other.json").write_text('{"format": "x"}')
    save_evaluation(tmp_path / "empty.json", models=[])
    save_evaluation(tmp_path / "wrong.json", models=[{"parameters": "many"}])
    against = [{"name": "p", "ref": "p", "similarity": {"matrix": [[1], [1, 2]]}}]
    save_evaluation(tmp_path / "ragged.json", models=[model("a", 1.0, against=against)], **BARE)
    (tmp_path / "folder").mkdir()
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "surgery.json").write_text('{"surgery": 9}')
    (tmp_path / "torn.surgery-run").mkdir()
    (tmp_path / "torn.surgery-run" / "metrics.jsonl").write_text('{"step": 0}\n{"st\n{}\n')
    return tmp_path


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["run.json"], 2, "add -o report.html"),
        (["run.json", "-o", "."], 1, "is a directory"),
        (["run.json", "-o", "run.json", "--force"], 1, "is one of the inputs"),
        (["run.json", "-o", "old.html"], 1, "exists"),
        (["gone.json", "-o", "x.html"], 1, "does not exist"),
        (["old.html", "-o", "x.html"], 1, "is not JSON"),
        (["other.json", "-o", "x.html"], 1, "no saved evaluation"),
        (["empty.json", "-o", "x.html"], 1, "nothing that a report could show"),
        (["folder", "-o", "x.html"], 1, "has no surgery.json"),
        (["later", "-o", "x.html"], 1, "is a record of format 9"),
        (["wrong.json", "-o", "x.html"], 1, "models[0].parameters is no number"),
        (["ragged.json", "-o", "x.html"], 1, "similarity.matrix is no matrix"),
        (["torn.surgery-run", "-o", "x.html"], 1, "line 2 is not JSON"),
    ],
)
def test_wrong_asks_are_refused_in_one_sentence(words, code, told, asks, capsys):
    before = sorted(asks.iterdir())
    assert main(["report", *words]) == code
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert sorted(asks.iterdir()) == before
    assert (asks / "old.html").read_text() == "mine"


def test_without_plotly_nothing_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("surgery.charts.find_spec", lambda _: None)
    monkeypatch.setattr("surgery.report.read_all", lambda _: pytest.fail("read"))
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "x.html")]) == 2
    assert "pip install 'model-surgery[html]'" in capsys.readouterr().err
