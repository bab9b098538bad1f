"""Wrong asks are refused in one sentence when planning, and torch is not loaded for it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from growth.widen import widen
from surgery.checkpoint import open_checkpoint
from surgery.errors import PlanError, RecipeError

WRONG = [
    ({}, "needs either --factor or --to"),
    ({"factor": 2, "to": 64}, "needs either --factor or --to"),
    ({"factor": 1}, "outside 2 to 64"),
    ({"factor": -2}, "outside 2 to 64"),
    ({"factor": 2, "noise": 0.5}, "outside 0 to 0.4"),
    ({"factor": 2, "noise": -0.1}, "outside 0 to 0.4"),
    ({"factor": 2, "noise": float("nan")}, "outside 0 to 0.4"),
    ({"to": 64, "noise": 0.1}, "goes with --factor"),
    ({"factor": 2, "intermediate_size": 99}, "goes with --to"),
    ({"factor": 2, "method": "aki"}, "goes with --to"),
    ({"to": 64, "method": "net2net"}, "neither fpi nor aki"),
    ({"to": 32}, "not above the model's width of 32"),
    ({"to": 16}, "not above the model's width of 32"),
    ({"to": 0}, "not above the model's width of 32"),
    ({"to": 40}, "makes 2.5 key-value heads of 2; choose a multiple of 16"),
    ({"to": 33}, "choose a multiple of 16"),
    ({"to": 64, "intermediate_size": 40}, "does not grow"),
    ({"to": 32, "intermediate_size": 48}, "is what the model has already"),
]


@pytest.mark.parametrize(("ask", "told"), WRONG)
def test_a_wrong_ask_is_refused(ask, told, opened):
    with pytest.raises(RecipeError, match=told):
        widen(opened("llama"), **ask)


def test_a_feed_forward_size_that_does_not_grow_along_must_be_told(opened, tmp_path, structure):
    base = opened("qwen3_moe")
    with pytest.raises(RecipeError, match="does not grow feed-forward layers of 48, 24 units"):
        widen(base, to=64, intermediate_size=71)
    assert widen(base, to=64, intermediate_size=72).config["moe_intermediate_size"] == 36


@pytest.mark.parametrize("name", ["falcon", "deepseek_v3", "gpt_oss", "qwen3_next", "gemma3"])
def test_an_unknown_layout_is_refused(name, opened):
    with pytest.raises(PlanError, match="whose dimensions are not known"):
        widen(opened(name), factor=2)


def changed(structure, tmp_path, name, **entries):
    """A structure whose config says something else."""
    import shutil

    path = tmp_path / name
    shutil.copytree(structure(name), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | entries))
    return open_checkpoint(path)


def test_an_architecture_that_was_never_tried_is_refused(structure, tmp_path):
    base = changed(structure, tmp_path, "llama", model_type="bert_of_tomorrow")
    with pytest.raises(PlanError, match="not known to compute the same"):
        widen(base, factor=2)


def test_heads_that_are_told_apart_by_position_are_refused(structure, tmp_path):
    base = changed(structure, tmp_path, "llama", alibi=True)
    with pytest.raises(PlanError, match="tells heads apart"):
        widen(base, factor=2)


def test_a_head_that_is_lost_is_refused(structure, tmp_path):
    base = changed(structure, tmp_path, "llama_tied", tie_word_embeddings=False)
    with pytest.raises(PlanError, match="there is no head"):
        widen(base, factor=2)


def test_planning_loads_no_torch(structure):
    code = (
        "import sys; from growth.widen import widen;"
        "from surgery.checkpoint import open_checkpoint;"
        "plan = widen(open_checkpoint(sys.argv[1]), factor=2, noise=0.3);"
        "print(len(plan.steps), 'torch' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(structure("llama"))],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.stdout.split() == ["39", "False"], ran.stderr


def test_the_command_line_plans_and_writes(structure, tmp_path, capsys):
    from cli.main import main

    base, out = str(structure("llama")), str(tmp_path / "wide")
    ask = ["widen", base, "--factor", "2", "--noise", "0.3", "-o", out]
    assert main([*ask, "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tensors"] == 39
    assert not (tmp_path / "wide").exists()
    assert main([*ask, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["facts"]
    assert facts["widths"]["hidden"] == [32, 64]
    assert main(["verify", out]) == 0
    assert main(["widen", base, "--to", "33"]) == 2
