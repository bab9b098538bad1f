"""`surgery emr` and `surgery tall`: both write stores, either makes models of them."""

import json
from pathlib import Path

import pytest

from cli.main import main
from engine import tiny


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n, name in enumerate(("base", "math", "code")):
        tiny.write(tmp_path / name, seed=n)
    return tmp_path


def run(capsys, *words, code=0):
    assert main(list(words)) == code
    return capsys.readouterr()


@pytest.mark.parametrize("rule", [("emr",), ("tall",), ("tall", "--lambda", "0.2,0.6")])
def test_a_store_is_built_told_checked_reproduced_and_used(here, capsys, rule):
    kind, *options = rule
    told = run(capsys, kind, "build", "base", "math", "code", "-o", "st", *options)
    assert "share of weights in the mask of math" in told.out
    assert ("rescaler of code" in told.out) == (kind == "emr")
    assert "MB of it masks, beside the base" in told.err
    run(capsys, "verify", "st", "--no-load")
    run(capsys, "reproduce", "st")
    for group in ("emr", "tall"):
        run(capsys, group, "task", "st", "math", "-o", f"math by {group}")
    run(capsys, "verify", "math by emr", "--no-load")
    run(capsys, "reproduce", "math by emr")
    assert tiny.tree(Path("math by emr")) == tiny.tree(Path("math by tall"))
    assert {p.name for p in Path("math by emr").iterdir()} >= {"tokenizer.json", "config.json"}
    assert Path("math by emr/config.json").read_text() != Path("st/config.json").read_text()


def test_names_and_defaults(here, capsys):
    run(capsys, "emr", "build", "base", "math", "code", "--name", "a", "--name", "b")
    assert json.loads(Path("base-emr/config.json").read_text())["tasks"] == ["a", "b"]
    run(capsys, "emr", "task", "base-emr", "b")
    assert Path("base-b").is_dir()


def test_a_base_that_moved_is_named(here, capsys):
    run(capsys, "emr", "build", "base", "math", "code", "-o", "st")
    Path("base").rename("moved")
    assert "does not exist" in run(capsys, "emr", "task", "st", "math", "-o", "x", code=1).err
    run(capsys, "emr", "task", "st", "math", "-o", "x", "--base", "moved")


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["emr", "task", "st", "mat"], 2, "did you mean math?"),
        (["emr", "task", "base", "math"], 1, "base: is no store of task masks"),
        (["emr", "task", "st", "math", "--base", "code", "-o", "x"], 1, "is not what it was"),
        (["emr", "build", "base", "math"], 2, "needs two or more models"),
        (["emr", "build", "base", "math", "math"], 1, "task math-2: is the same model"),
        (["tall", "build", "base", "math", "code", "--lambda", "a"], 2, "--lambda a: is no number"),
        (["tall", "build", "base", "math", "code", "--lambda", "1,2,3"], 2, "3 values for 2"),
        (["emr", "build", "base", "math", "code", "--rescaler", "x"], 2, "--rescaler"),
    ],
)
def test_a_mistake_is_one_sentence(here, capsys, words, code, told):
    run(capsys, "emr", "build", "base", "math", "code", "-o", "st")
    said = run(capsys, *words, code=code).err
    assert told in said
    assert said.count("\n") == 1


def test_a_pipeline_builds_a_store_and_takes_models_from_it(here, capsys):
    Path("p.yml").write_text(
        "steps:\n"
        "  st: {command: emr build, base: base, models: [math, code]}\n"
        "  mine: {command: emr task, store: st, task: math, base: base}\n"
        "  other: {command: tall task, store: st, task: code, base: base}\n"
    )
    for state in ("made", "skipped"):
        found = json.loads(run(capsys, "run", "p.yml", "--json").out)
        assert [one["state"] for one in found["steps"]] == [state] * 3
    run(capsys, "emr", "build", "base", "math", "code", "-o", "by-hand")
    run(capsys, "emr", "task", "by-hand", "math", "-o", "mine")
    assert (
        tiny.tree(Path("p/mine"))["model.safetensors"]
        == tiny.tree(Path("mine"))["model.safetensors"]
    )
