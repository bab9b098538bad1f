"""From a cut model over its recovery and evaluation to the page, as a user goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.main import main
from surgery.report import read_all
from surgery.report.page import sections

BASE = Path("fixtures/base").resolve()


def surgery(*words):
    assert main([str(word) for word in words]) == 0


def test_what_the_other_commands_save_fills_every_section(tmp_path, monkeypatch):
    pytest.importorskip("plotly")
    text = Path("fixtures/heldout/mix.jsonl").resolve()
    monkeypatch.chdir(tmp_path)
    some = text.read_text(encoding="utf-8").splitlines(keepends=True)[:6]
    Path("text.jsonl").write_text("".join(some), encoding="utf-8")
    Path("quiz.jsonl").write_text(json.dumps({"good": "The cats sleep.", "bad": "Cats the."}))
    surgery("prune", BASE, "--layers", "2", "-o", "cut")
    surgery(
        "recover", "cut", "--teacher", BASE, "--data", text, "--held-out", "text.jsonl",
        "--tokens", "2048", "--context", "64", "--batch-tokens", "512", "-o", "healed",
    )  # fmt: skip
    surgery(
        "eval", BASE, "cut", "healed", "--text", "text.jsonl", "--pairs", "quiz.jsonl", "--maps",
        "--samples", "1", "--speed", "--gate", "bpb<9", "-o", "run.json",
    )  # fmt: skip
    surgery(
        "linearize", BASE, "--method", "swa-sink", "--window", "16", "--stage", "none",
        "--held-out", "text.jsonl", "-o", "window",
    )  # fmt: skip
    runs = [Path("run.json"), Path("healed"), Path("healed.surgery-run")]
    found = read_all([*runs, Path("window")])
    assert [section.name for section in sections(found) if not section.blocks] == []
    assert [len(run.steps) for run in found.trainings] == [4]
    names = [model.name for model in read_all(runs).lineage.models.values()]
    assert names == ["healed", "cut", "healed.surgery-run/trained", "base"]
    surgery("report", "run.json", "healed", "healed.surgery-run", "-o", "report.html")
