"""What a linearization cost, on the page: its table, its stages, its run's folder."""

from __future__ import annotations

import json

import pytest

from cli.main import main
from reported import HOSTILE, TAME, save_record, save_training

SHARE = {"share": 0.75, "low": 0.5, "high": 0.875}
ROW = {"bits_per_byte": 1.5, "more": 0.25, "low": 0.125, "high": 0.5, "kl": 0.5, "agreement": 0.75}


def facts_of(word: str = TAME) -> dict:
    teacher = {"name": "teacher", "bits_per_byte": 1.25, "closed": {}}
    row = {"name": word, **ROW, "closed": {"swa-sink": SHARE}}
    told = {"steps": 4, "tokens": 400, "parameters_trained": 7, "losses": [[0, 2.0], [2, 1.5]]}
    return {
        "state_bytes": 1000,
        "kv_bytes_per_token": 100,
        "break_even": 10,
        "stages": [{"stage": "transfer", **told}, {"stage": "lora", **told}],
        "table": {
            "model": f"/secret/{word}",
            "texts": {"/secret/new.jsonl": "1"},
            "rows": [teacher, row],
        },
    }


def save_linearized(folder, base, word: str = TAME):
    return save_record(folder, base, operation="linearize stages", facts=facts_of(word))


@pytest.fixture
def page(report, tmp_path):
    return lambda *paths: report(*paths).read_text(encoding="utf-8")


def test_table_and_stages_of_a_linearized_model_are_shown(page, tmp_path) -> None:
    found = page(save_linearized(tmp_path / "fast", tmp_path / "base"))
    for text in ("75%", "50% to 88%", "+0.2500", "+0.1250 to +0.5000", "new.jsonl"):
        assert text in found
    assert "fast: transfer" in found
    assert "fast: lora" in found
    assert "/secret" not in found


def test_names_of_rows_are_escaped(page, tmp_path) -> None:
    found = page(save_linearized(tmp_path / "fast", tmp_path / "base", HOSTILE))
    assert HOSTILE not in found


def test_a_linearized_model_that_was_not_measured_has_no_table(page, tmp_path) -> None:
    facts = {"stages": facts_of()["stages"]}
    operation = "linearize stages"
    found = page(
        save_record(tmp_path / "fast", tmp_path / "base", operation=operation, facts=facts)
    )
    assert 'id="linearized"' not in found
    assert "fast: lora" in found


def test_the_folder_of_the_run_shows_its_stages(tmp_path, capsys) -> None:
    for stage in ("transfer", "lora"):
        save_training(tmp_path / "fast.surgery-run" / f"{stage}.surgery-run")
    assert main(["report", str(tmp_path / "fast.surgery-run"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in told["trainings"]] == ["lora", "transfer"]


def test_a_table_of_the_wrong_kind_is_refused(tmp_path, capsys) -> None:
    facts = {"stages": [], "table": {"rows": [{"name": 3}]}}
    folder = save_record(
        tmp_path / "fast", tmp_path / "base", operation="linearize stages", facts=facts
    )
    assert main(["report", str(folder), "-o", str(tmp_path / "page.html")]) == 1
    assert "is no string" in capsys.readouterr().err
