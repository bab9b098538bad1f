"""Layers chosen by what they do: the papers' formulas, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cli.main import main
from growth.laco import collapse, find_collapse, melt
from growth.prune import choose_layers, prune
from surgery.calibrate import calibrate
from surgery.checkpoint import open_checkpoint
from surgery.errors import CheckpointError, PlanError, RecipeError
from surgery.evaluate import evaluate

FIXTURES = Path(__file__).parents[2] / "fixtures"
BASE, TEXT = FIXTURES / "base", FIXTURES / "heldout" / "mix.jsonl"


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    out = tmp_path_factory.mktemp("statistics") / "base.safetensors"
    calibrate(BASE, [TEXT], out, collect=("layers",))
    return open_checkpoint(out)


@pytest.fixture(scope="module")
def figures(statistics):
    return {name: t.numpy() for name, t in load_file(statistics.files[0]).items()}


def choose(statistics, method, layers):
    return choose_layers(open_checkpoint(BASE), statistics, method=method, layers=layers)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_block_influence_drops_the_layers_that_turn_the_stream_least(statistics, figures, layers):
    influence = 1 - np.diagonal(figures["cosine"], 1)
    gone, scores = choose(statistics, "block-influence", layers)
    assert gone == sorted(np.argsort(influence, kind="stable")[:layers].tolist())
    np.testing.assert_allclose(scores, influence)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_angular_drops_the_run_of_least_angle(statistics, figures, layers):
    angles = np.diagonal(figures["angle.last"], layers)
    gone, scores = choose(statistics, "angular", layers)
    assert gone == list(range(angles.argmin(), angles.argmin() + layers))
    np.testing.assert_allclose(scores, angles)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_similarity_drops_the_run_of_greatest_cosine(statistics, figures, layers):
    cosines = np.diagonal(figures["cosine"], layers)
    gone, _ = choose(statistics, "similarity", layers)
    assert gone == list(range(cosines.argmax(), cosines.argmax() + layers))


def test_tail_drops_the_last_and_measures_nothing():
    assert choose(None, "tail", 2)[0] == [2, 3]


def test_block_influence_beats_dropping_another_layer(statistics, write, tmp_path):
    base = open_checkpoint(BASE)
    chosen = choose(statistics, "block-influence", 1)[0][0]
    models = [
        write(prune(base, layers=str(layer)), f"without{layer}") for layer in (chosen, *range(4))
    ]
    found = evaluate([models[0], *(m for i, m in enumerate(models[1:]) if i != chosen)], [TEXT])
    changes = [model.domains[0].difference for model in found.models[1:]]
    assert sum(change.high < 0 for change in changes) == 0
    assert sum(change.low > 0 for change in changes) >= 2


def test_melting_is_the_papers_sum_of_differences():
    """theta_l + sum_k (theta_l+k - theta_l), on numbers."""
    theta = np.array([2.0, 3.0, 5.0, 7.0, 11.0])
    mixtures = melt([{n: 1} for n in range(5)], 1, 2)
    values = [sum(theta[n] * c for n, c in row.items()) for row in mixtures]
    assert values == [2.0, 3.0 + (5.0 - 3.0) + (7.0 - 3.0), 11.0]
    again = melt(mixtures, 0, 1)
    assert [sum(theta[n] * c for n, c in row.items()) for row in again] == [9.0, 11.0]


def test_a_melted_layer_is_the_sum_of_its_sources(write):
    rows = [{"0": 1}, {"1": -1, "2": 1, "3": 1}]
    path = write(collapse(open_checkpoint(BASE), mixtures=rows, threshold=0.4))
    new = load_file(next(path.glob("*.safetensors")))
    old = load_file(next(BASE.glob("*.safetensors")))
    for rest in ("mlp.up_proj.weight", "input_layernorm.weight"):
        one, two, three = (old[f"model.layers.{n}.{rest}"].double() for n in (1, 2, 3))
        expected = (two + three - one).to(torch.bfloat16)
        assert torch.equal(new[f"model.layers.1.{rest}"], expected)
        assert torch.equal(new[f"model.layers.0.{rest}"], old[f"model.layers.0.{rest}"])
    _, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info[kind] for kind in info)


def test_melting_measures_the_model_it_then_writes(write):
    """The likeness in memory is that of the written model, by transformers."""
    base = open_checkpoint(BASE)
    mixtures = find_collapse(base, [TEXT], layers=2, threshold=-1)
    rows = [{str(n): c for n, c in row.items()} for row in mixtures]
    path = write(collapse(base, mixtures=rows, threshold=-1))
    ids = torch.arange(1, 60)[None]
    states = [
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32)
        .eval()
        .base_model(ids)
        .last_hidden_state
        for p in (BASE, path)
    ]
    cosine = torch.nn.functional.cosine_similarity(*states, dim=-1).mean()
    assert cosine > 0.3
    assert len(mixtures) == 2


def test_a_threshold_that_nothing_meets_is_told():
    with pytest.raises(RecipeError, match=r"melts only 0 of 2 layers"):
        find_collapse(open_checkpoint(BASE), [TEXT], layers=2, threshold=0.999)


def test_layers_of_different_kinds_do_not_melt(opened):
    base = opened("qwen3_next")
    with pytest.raises(PlanError, match=r"same tensors|kind"):
        collapse(base, mixtures=[{"0": 1}, {"1": -1, "2": 1, "3": 1}], threshold=0.4)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--layers", "1-2", "--method", "angular"], "not a number of layers"),
        (["--layers", "4", "--method", "tail"], "outside 1 to 3"),
        (["--layers", "0", "--method", "angular"], "outside 1 to 3"),
        (["--layers", "1", "--method", "angular"], "needs --calibration"),
        (["--layers", "1", "--method", "laco"], "needs --calibration"),
        (["--layers", "1", "--method", "laco", "--threshold", "2"], "outside -1 to 1"),
        (["--layers", "1", "--method", "angular", "--calibration", "no.txt"], "is not there"),
        (["--layers", "1", "--method", "tail", "--calibration", str(TEXT)], "--calibration: is of"),
        (["--layers", "1", "--samples", "3"], "--samples: is of no use to --layers without"),
        (["--layers", "1", "--method", "tail", "--threshold", "0.5"], "is for --method laco"),
        (
            ["--layers", "1", "--method", "laco", "--calibration", str(TEXT), "--statistics", "s"],
            "--statistics: is of no use to --method laco",
        ),
        (
            ["--layers", "1", "--method", "laco", "--calibration", str(TEXT), "--context", "9999"],
            "--context: 9999 is above the 128 tokens",
        ),
        (
            ["--layers", "1", "--method", "angular", "--calibration", str(TEXT), "--context=9999"],
            "--context: 9999 is above the 128 tokens",
        ),
        (
            [
                "--layers",
                "1",
                "--method",
                "angular",
                "--calibration",
                str(BASE / "model.safetensors"),
            ],
            "no file of statistics",
        ),
    ],
)
def test_wrong_asks_cost_one_sentence(words, told, tmp_path, capsys):
    code = main(["prune", str(BASE), *words, "-o", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert code in {1, 2}
    assert told in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", [["--context", "9"], ["--samples", "9"], ["--device", "x"]])
def test_how_to_measure_is_refused_beside_statistics(option, statistics, tmp_path, capsys):
    words = ["--layers", "1", "--method", "angular", "--calibration", str(statistics.files[0])]
    assert main(["prune", str(BASE), *words, *option, "-o", str(tmp_path / "out")]) == 2
    assert f"{option[0]}: is of no use beside" in capsys.readouterr().err


def test_statistics_of_another_model_are_refused(statistics):
    with pytest.raises(RecipeError, match="another model"):
        choose_layers(open_checkpoint(FIXTURES / "uni"), statistics, method="angular", layers=1)


def test_statistics_that_lack_layers_are_refused(tmp_path):
    out = tmp_path / "inputs.safetensors"
    calibrate(BASE, [TEXT], out, collect=("inputs",), samples=2)
    with pytest.raises(CheckpointError, match="--collect layers"):
        choose(open_checkpoint(out), "angular", 1)


def test_the_command_measures_once_and_records_its_choice(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["prune", str(BASE), "--method", "block-influence", "--layers", "1"]
    words += ["--calibration", str(TEXT), "--samples", "8", "-o", str(out), "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["facts"]["method"] == "block-influence"
    kept = tmp_path / "out-calibration.safetensors"
    before = kept.stat().st_mtime_ns
    assert main([*words, "--force"]) == 0
    assert kept.stat().st_mtime_ns == before
    assert main(["reproduce", str(out)]) == 0


@pytest.fixture
def adapter(tmp_path):
    """A LoRA adapter of the base that changes much."""
    from safetensors.torch import load_file, save_file

    folder, generator = tmp_path / "adapter", torch.Generator().manual_seed(0)
    folder.mkdir()
    shape = load_file(BASE / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].shape
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    pair = {"A": (8, shape[1]), "B": (shape[0], 8)}
    tensors = {name.format(k): torch.randn(v, generator=generator) for k, v in pair.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def asks(*words: object) -> list[str]:
    text = ["--calibration", str(TEXT), "--samples", "4", "--context", "64"]
    return [*map(str, words), "--layers", "1", *text]


@pytest.mark.parametrize("method", ["block-influence", "laco"])
def test_a_base_with_an_adapter_is_measured_with_it(method, adapter, tmp_path, capsys):
    fused = tmp_path / "fused"
    assert main(["lora", "fuse", str(BASE), str(adapter), "-o", str(fused)]) == 0
    more = ["--method", method, "--json"]
    more += ["--threshold", "-0.9"] if method == "laco" else []
    for model, out in ((f"{BASE}+{adapter}", "one"), (fused, "two")):
        assert main([*asks("prune", model, *more), "-o", str(tmp_path / out)]) == 0
    capsys.readouterr()
    one, two = (
        json.loads((tmp_path / out / "surgery.json").read_text())["parameters"]
        for out in ("one", "two")
    )
    assert one == two


def test_laco_measures_the_adapter_too(adapter, tmp_path, monkeypatch):
    from surgery.evaluate import load

    seen = []
    real = load.open_source
    monkeypatch.setattr(load, "open_source", lambda ref, *a: seen.append(str(ref)) or real(ref, *a))
    model = f"{BASE}+{adapter}"
    words = asks("prune", model, "--method", "laco", "--threshold", "-0.9")
    assert main([*words, "-o", str(tmp_path / "out")]) == 0
    assert seen == [model]


@pytest.mark.parametrize(
    "words",
    [
        ["prune", BASE, "--layers", "1", "--method", "angular"],
        ["prune", BASE, "--width", "ffn=100"],
        ["sparsify", BASE, "--method", "wanda", "--sparsity", "0.5"],
    ],
)
def test_a_dry_run_keeps_no_statistics(words, tmp_path, capsys):
    more = ["--calibration", TEXT, "--samples", "4", "--dry-run", "-o", tmp_path / "out"]
    assert main([*map(str, words), *map(str, more)]) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_stays_keeps_its_statistics(tmp_path, capsys):
    words = [*asks("prune", BASE, "--method", "angular"), "-o", str(tmp_path / "out")]
    assert main(words) == 0
    kept = (tmp_path / "out-calibration.safetensors").read_bytes()
    assert main([*words, "--samples", "5"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "out-calibration.safetensors").read_bytes() == kept


def test_a_step_keeps_its_statistics_in_the_pipelines_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("def sum_of(numbers):\n    return sum(numbers)\n" * 20)
    step = {"command": "prune", "base": str(BASE), "method": "angular", "layers": 1}
    step |= {"calibration": [str(text)]}
    (tmp_path / "p.yml").write_text(json.dumps({"steps": {"pruned": step}}))
    assert main(["run", "p.yml", "-o", "out"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "p.yml", "text.txt"]
    assert (tmp_path / "out" / "pruned-calibration.safetensors").is_file()


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("block-influence", "; influence of each layer (1 - cosine of before and behind)"),
        ("angular", "; angle (in units of pi) over the run from each layer on"),
        ("similarity", "; cosine over the run from each layer on, the greatest goes: 0: 0."),
        ("tail", "layer 3 goes"),
    ],
)
def test_a_note_tells_which_layers_go_and_by_what(method, told, statistics):
    gone, scores = choose(statistics, method, 1)
    plan = prune(open_checkpoint(BASE), layers=f"{gone[0]}", method=method, scores=scores)
    assert plan.notes[-1].startswith(f"layer {gone[0]} goes")
    assert told in plan.notes[-1]


def test_nothing_is_said_to_go_where_nothing_is_written(statistics, tmp_path, capsys):
    out = tmp_path / "out"
    out.write_text("mine")
    assert main(["prune", str(BASE), "--layers", "1", "--method", "tail", "-o", str(out)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
