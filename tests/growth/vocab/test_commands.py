"""The commands as a user calls them, what they print, and that their records repeat them."""

from __future__ import annotations

import json

import pytest
import speakers

from cli.main import main

ASKS = {
    "extend": ["vocab", "extend", "{base}", "--token", "<|tool|>", "--init", "subword"],
    "trim": ["vocab", "trim", "{base}", "--text", "{text}"],
    "transplant": ["vocab", "transplant", "{base}", "--tokenizer-from", "{donor}", "--k", "3"],
    "pad": ["vocab", "pad", "{base}", "--multiple", "100"],
    "context": ["context", "{base}", "--factor", "4", "--method", "yarn"],
}


@pytest.fixture
def words(fixtures_dir, tmp_path):
    speakers.speaker(tmp_path, "sums")
    (tmp_path / "text.txt").write_text("import os\n")
    names = {
        "base": str(fixtures_dir / "base"),
        "text": str(tmp_path / "text.txt"),
        "donor": str(tmp_path / "sums"),
    }
    return lambda ask: [word.format(**names) for word in ASKS[ask]]


@pytest.mark.parametrize("ask", ASKS)
def test_a_command_writes_a_model_that_its_record_repeats(ask, words, tmp_path, capsys):
    assert main([*words(ask), "-o", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "config.json").exists()
    assert main(["reproduce", str(tmp_path / "out")]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("ask", ASKS)
def test_a_dry_run_tells_and_writes_nothing(ask, words, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*words(ask), "-o", str(out), "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    wanted = {"context": "max_position_embeddings"}.get(ask, "made_of")
    assert wanted in told["facts"]
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["vocab", "extend", "{base}"], "is given no token"),
        (["vocab", "trim", "{base}"], "neither texts nor tokens"),
        (["vocab", "transplant", "{base}", "--tokenizer-from", "{base}"], "the same tokens"),
        (["vocab", "pad", "{base}", "--multiple", "0"], "outside 1"),
        (["context", "{base}", "--factor", "0.5"], "not above 1"),
    ],
)
def test_a_wrong_ask_is_one_sentence(words, told, fixtures_dir, capsys):
    base = str(fixtures_dir / "base")
    assert main([word.format(base=base) for word in words]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
