"""`surgery factor`: what it refuses, and what other commands make of its results."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from factor_models import FIXTURES, record

from cli.main import main
from growth.factor.plan import factor
from growth.recurse.tying import tie
from surgery.checkpoint import open_checkpoint
from surgery.errors import SurgeryError

BASE = str(FIXTURES / "base")
ASKS = [
    ({"method": "svd"}, "needs --rank, --ratio or --energy"),
    ({"method": "svd", "rank": 0}, "is below 1"),
    ({"method": "svd", "ratio": 2.0}, "is outside"),
    ({"method": "svd", "ratio": float("nan")}, "is outside"),
    ({"method": "svd", "ratio": 0.001}, "no rank"),
    ({"method": "svd", "energy": 1.5}, "is outside"),
    ({"method": "svd", "ratio": 0.5, "rank": 3}, "decides the ranks"),
    ({"method": "svd", "rank": 3, "density": 0.1}, "sparse-low-rank alone"),
    ({"method": "sparse-low-rank", "rank": 3, "density": 1.0}, "is outside"),
    ({"method": "sparse-low-rank", "ratio": 0.1, "density": 0.2}, "leaves nothing"),
    ({"method": "svd", "rank": 3, "svd": "lanczos"}, "is none of"),
    ({"method": "tucker", "rank": 3}, "is none of"),
    ({"method": "svd-llm", "rank": 3}, "needs statistics"),
    ({"method": "svd", "rank": 3, "include": ["lm_head"]}, "matches no linear"),
]
MODELS = [
    ("mixtral", {"method": "svd", "rank": 3}, "one expert of several"),
    ("gpt_oss", {"method": "svd", "rank": 3, "include": ["experts"]}, "matches no linear"),
    ("llava", {"method": "svd", "rank": 3}, "no causal language model|towers"),
]


@pytest.mark.parametrize(("asks", "words"), ASKS)
def test_wrong_asks_are_refused(asks, words):
    with pytest.raises(SurgeryError, match=words):
        factor(open_checkpoint(BASE), **asks)


@pytest.mark.parametrize(("name", "asks", "words"), MODELS)
def test_models_that_cannot_be_factored_are_refused(name, asks, words, opened):
    with pytest.raises(SurgeryError, match=words):
        factor(opened(name), **asks)


def test_sizes_that_are_prime_have_no_blocks(opened):
    tensors = opened("llama").tensors
    name = "model.layers.0.mlp.up_proj.weight"
    from dataclasses import replace

    prime = replace(tensors[name], shape=(47, 32), nbytes=47 * 32 * 4)
    odd = replace(opened("llama"), tensors={**tensors, name: prime})
    with pytest.raises(SurgeryError, match="47 outputs, a prime number"):
        factor(odd, method="monarch", rank=1)


def test_what_is_factored_or_recursive_already_is_refused(factored, opened, write):
    with pytest.raises(SurgeryError, match="is factored already"):
        factor(open_checkpoint(factored("llama_bias", "svd", rank=3)), method="svd", rank=2)
    with pytest.raises(SurgeryError, match="is recursive"):
        factor(open_checkpoint(write(tie(opened("llama"), blocks=2))), method="svd", rank=2)


def test_a_wrong_ask_costs_no_torch():
    code = (
        "import sys\nfrom cli.main import main\n"
        f"code = main(['factor', {BASE!r}, '--method', 'svd', '--rank', '0'])\n"
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["2", "False"]


def test_planning_imports_no_torch():
    code = (
        "import sys\nfrom cli.main import main\n"
        f"main(['factor', {BASE!r}, '--method', 'monarch', '--ratio', '0.5', '--dry-run'])\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split()[-1] == "False"


@pytest.mark.parametrize(
    "words",
    [
        ["--method", "svd", "--rank", "3"],
        ["--method", "svd", "--energy", "0.9"],
        ["--method", "monarch", "--rank", "2"],
        ["--method", "sparse-low-rank", "--ratio", "0.5"],
        ["--method", "svd-llm", "--ratio", "0.5", "--calibration", "TEXT", "--samples", "8"],
    ],
)
def test_results_verify_and_are_reproduced(words, halves, tmp_path, capsys):
    words = [str(halves[0]) if word == "TEXT" else word for word in words]
    out, dense = tmp_path / "out", tmp_path / "dense"
    assert main(["factor", BASE, *words, "-o", str(out)]) == 0
    assert main(["factor", str(out), "--materialize", "-o", str(dense)]) == 0
    for path in (out, dense):
        assert main(["verify", str(path)]) == 0
        assert main(["reproduce", str(path)]) == 0
    told = capsys.readouterr()
    assert "failed" not in told.out
    assert "error in all: " in told.out
    assert "of the model's parameters" in told.err


def test_verify_loads_it_and_inspect_counts_it(factored, capsys):
    path = str(factored("base", "monarch", ratio=0.5))
    capsys.readouterr()
    assert main(["verify", path, "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["loading"]["status"] == "ok"
    assert main(["inspect", path]) == 0
    assert "factored  4 layers" in capsys.readouterr().out


def test_eval_finds_it_equal_to_its_dense_form(factored, write, halves):
    from growth.factor.dense import materialize
    from surgery.evaluate import evaluate

    path = factored("base", "sparse-low-rank", ratio=0.5)
    dense = write(materialize(open_checkpoint(path)))
    found = evaluate([dense, path], [halves[1]])
    assert found.models[1].domains[0].difference.bits_per_byte == pytest.approx(0.0, abs=2e-3)


def test_eval_runs_no_other_modelling_file(factored, halves, tmp_path):
    from surgery.errors import CheckpointError
    from surgery.evaluate import evaluate

    path = shutil.copytree(factored("base", "svd", ratio=0.5), tmp_path / "other")
    (path / "modeling_factored.py").write_text("raise SystemExit('run')\n")
    with pytest.raises(CheckpointError, match="not of the installed version's format"):
        evaluate([path], [halves[1]])


def test_factors_larger_than_the_map_are_told(opened):
    plan = factor(opened("llama"), method="svd", rank=1 << 20)
    assert any("more than the map's" in note for note in plan.notes)
    assert any("met exactly" in note for note in plan.notes)


def test_the_parameter_ratio_is_that_of_the_files(factored):
    path = factored("base", "svd", ratio=0.5)
    held = sum(tensor.numel for tensor in open_checkpoint(path).tensors.values())
    whole = sum(tensor.numel for tensor in open_checkpoint(BASE).tensors.values())
    assert record(path)["facts"]["parameter_ratio"] == pytest.approx(held / whole)


def test_a_pipeline_stacks_factors_by_outputs_and_multiplies_out(halves, tmp_path, capsys):
    script = tmp_path / "steps.json"
    measured = {"calibration": [str(halves[0])], "samples": 4}
    steps = {
        "deep": {"command": "stack", "base": BASE, "factor": 2},
        "thin": {"command": "factor", "base": "deep", "method": "svd-llm", "energy": 0.95},
        "dense": {"command": "factor", "base": "thin", "materialize": True},
    }
    steps["thin"] |= measured
    script.write_text(json.dumps({"steps": steps}))
    out = tmp_path / "out"
    assert main(["run", str(script), "-o", str(out)]) == 0, capsys.readouterr().err
    assert open_checkpoint(out / "dense").config["num_hidden_layers"] == 8
    told = [f for f in record(out / "thin")["told"].values() if "output_error" in f]
    assert max(figures["output_error"] for figures in told) <= 0.06
