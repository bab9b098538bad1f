"""Zeros inside linear maps: how many, which ones, and what making up for them is worth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cli.main import main
from growth.sparsify import Pattern, parse_sparsity, sparse_gpt, sparsify
from surgery.calibrate import calibrate
from surgery.checkpoint import open_checkpoint
from surgery.errors import PlanError, RecipeError, SurgeryError
from surgery.reproduce import reproduce

FIXTURES = Path(__file__).parents[2] / "fixtures"
TEXT = FIXTURES / "heldout" / "mix.jsonl"
METHODS = ("magnitude", "wanda", "sparsegpt")


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    out = tmp_path_factory.mktemp("statistics") / "base.safetensors"
    calibrate(FIXTURES / "base", [TEXT], out, collect=("inputs", "grams"), samples=32)
    return open_checkpoint(out)


@pytest.fixture(scope="module")
def sparse(statistics, write):
    made = {}

    def get(method, sparsity):
        if (method, sparsity) not in made:
            beside = None if method == "magnitude" else statistics
            base = open_checkpoint(FIXTURES / "base")
            plan = sparsify(base, beside, method=method, sparsity=sparsity)
            made[method, sparsity] = write(plan)
        return made[method, sparsity]

    return get


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}


def masked(path: Path) -> list[str]:
    import json

    return json.loads((path / "surgery.json").read_text())["facts"]["masked"]


@pytest.mark.parametrize("method", METHODS)
def test_every_map_has_its_share_of_zeros(sparse, method):
    path = sparse(method, "0.5")
    found = weights(path)
    assert len(masked(path)) == 28
    for module in masked(path):
        share = float((found[f"{module}.weight"] == 0).double().mean())
        assert share == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_two_of_every_four_inputs_stay(sparse, method):
    path = sparse(method, "2:4")
    found = weights(path)
    for module in masked(path):
        groups = found[f"{module}.weight"].view(-1, 4)
        assert int((groups != 0).sum(1).max()) == 2


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_weights_that_stay_keep_their_bits(sparse, method):
    found, base = weights(sparse(method, "0.5")), weights(FIXTURES / "base")
    for name, tensor in found.items():
        stays = tensor != 0
        assert torch.equal(tensor[stays], base[name][stays])


def test_magnitude_drops_the_least_of_each_map(sparse):
    found, base = weights(sparse("magnitude", "0.5")), weights(FIXTURES / "base")
    for module in masked(sparse("magnitude", "0.5")):
        old = base[f"{module}.weight"].double().abs()
        gone = found[f"{module}.weight"] == 0
        assert old[gone].max() <= old[~gone].min()


def test_wanda_drops_the_least_products_of_each_output(sparse, statistics):
    """Against the paper's equation 1 in numpy."""
    found, base = weights(sparse("wanda", "0.5")), weights(FIXTURES / "base")
    squares = load_file(statistics.files[0])
    for module in masked(sparse("wanda", "0.5")):
        old = base[f"{module}.weight"].double().numpy()
        score = np.abs(old) * np.sqrt(squares[f"{module}.square"].double().numpy())
        gone = (found[f"{module}.weight"] == 0).numpy()
        for scores, zeros in zip(score, gone, strict=True):
            assert zeros.sum() == len(zeros) // 2
            assert scores[zeros].max() <= scores[~zeros].min() * (1 + 1e-6)


@pytest.mark.parametrize("pattern", [Pattern(0.5), Pattern(0.5, 2, 4)])
def test_sparsegpt_is_the_papers_column_by_column_update(pattern):
    """Against the exact greedy update without blocks: one Cholesky row after the other."""
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(6, 24, generator=generator, dtype=torch.float64)
    x = torch.randn(24, 24, generator=generator, dtype=torch.float64)
    gram = x @ torch.randn(24, 200, generator=generator, dtype=torch.float64)
    gram = gram @ gram.T
    found, _ = sparse_gpt(w, gram, pattern)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    gone = found == 0
    expected, inverse = w.clone(), damped.inverse()
    for i in range(24):  # optimal brain surgeon, the columns before i fixed
        error = torch.where(gone[:, i], expected[:, i], 0.0) / inverse[i, i]
        expected -= error[:, None] * inverse[i]
        expected[:, i] = torch.where(gone[:, i], 0.0, expected[:, i])
        inverse = inverse - inverse[:, i : i + 1] * inverse[i : i + 1] / inverse[i, i]
    assert torch.allclose(found, expected.masked_fill(gone, 0.0), atol=1e-8)


@pytest.mark.parametrize("pattern", [Pattern(1 / 3, 2, 3), Pattern(0.5, 48, 96)])
def test_patterns_hold_across_the_blocks_of_sparsegpt(pattern):
    generator = torch.Generator().manual_seed(4)
    w = torch.randn(6, 288, generator=generator)
    found, _ = sparse_gpt(w, torch.eye(288), pattern)
    kept = (found.reshape(-1, pattern.of) != 0).sum(1)
    assert set(kept.tolist()) == {pattern.keep}


def test_making_up_for_zeros_lowers_the_error_of_outputs(sparse, statistics):
    grams, base = load_file(statistics.files[0]), weights(FIXTURES / "base")
    module = "model.layers.1.mlp.down_proj"
    gram, old = grams[f"{module}.gram"].double(), base[f"{module}.weight"].double()

    def error(method: str) -> float:
        change = weights(sparse(method, "0.5"))[f"{module}.weight"].double() - old
        return float(((change @ gram) * change).sum())

    assert error("sparsegpt") < error("wanda") < error("magnitude")


def test_outputs_load_whole(sparse):
    for method in METHODS:
        _, info = AutoModelForCausalLM.from_pretrained(
            sparse(method, "2:4"), output_loading_info=True
        )
        assert not any(info[kind] for kind in info)


def test_a_record_with_statistics_reproduces(sparse):
    from cli.operations import find_operation

    report = reproduce(open_checkpoint(sparse("sparsegpt", "0.5")), find_operation)
    assert report.identical == 38
    assert not report.outputs


@pytest.mark.parametrize("text", ["0", "1", "1.5", "50%", "4:2", "0:4", "", "nan", "2:4:8"])
def test_strange_sparsities_are_refused(text):
    with pytest.raises(RecipeError, match="neither a share"):
        parse_sparsity(text)


@pytest.mark.parametrize(
    ("asks", "words"),
    [
        ({"method": "wanda", "sparsity": "0.5"}, "needs statistics"),
        ({"method": "magnitude", "sparsity": "3:7"}, "does not divide"),
        ({"method": "magnitude", "sparsity": "0.5", "include": ["lm_head"]}, "matches no linear"),
    ],
)
def test_wrong_asks_are_refused(asks, words):
    with pytest.raises(RecipeError, match=words):
        sparsify(open_checkpoint(FIXTURES / "base"), **asks)


def test_mixtures_stored_as_one_tensor_are_refused_for_wanda(opened, statistics):
    with pytest.raises(SurgeryError):
        sparsify(opened("qwen3_moe"), statistics, method="wanda", sparsity="0.5")


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_mixtures_are_refused_before_statistics_are_asked_for(opened, method):
    with pytest.raises(PlanError, match="experts"):
        sparsify(opened("mixtral"), method=method, sparsity="0.5")


def test_gpt2_maps_are_masked_along_their_inputs(opened, write):
    path = write(sparsify(opened("gpt2"), method="magnitude", sparsity="2:4"))
    weight = weights(path)["transformer.h.0.mlp.c_fc.weight"].T  # stored [inputs, outputs]
    assert int((weight.reshape(-1, 4) != 0).sum(1).max()) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_of_equal_magnitudes_the_first_of_the_map_go(dtype, tmp_path, write, monkeypatch):
    from safetensors.torch import save_file

    monkeypatch.setattr("growth.sparsify.CHUNK", 100)
    base, name = weights(FIXTURES / "base"), "model.layers.0.mlp.up_proj.weight"
    shape = base[name].shape
    old = (torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(5)) / 7).to(dtype)
    save_file({**base, name: old}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((FIXTURES / "base" / "config.json").read_text())
    plan = sparsify(open_checkpoint(tmp_path), method="magnitude", sparsity="0.3")
    found = weights(write(plan))[name].double().numpy().ravel()
    values = old.double().numpy().ravel()
    gone = np.argsort(np.abs(values), kind="stable")[: int(len(values) * 0.3)]
    values[gone] = 0.0
    np.testing.assert_array_equal(found, values)


def test_magnitude_holds_no_whole_map():
    from dataclasses import replace

    base = open_checkpoint(FIXTURES / "base")
    name = "model.layers.0.mlp.up_proj.weight"
    tensor = base.tensors[name]
    large = replace(tensor, shape=(1 << 15, 1 << 12), nbytes=1 << 29)
    wide = replace(base, tensors={**base.tensors, name: large})
    plan = sparsify(wide, method="magnitude", sparsity="0.5", include=[f"glob:{name[:-7]}"])
    step = next(step for step in plan.steps if step.outputs[0][0] == name)
    assert step.scratch < large.nbytes // 2


def test_options_of_measuring_are_refused_where_nothing_is_measured(tmp_path, capsys):
    words = ["--method", "magnitude", "--sparsity", "0.5", "--calibration", "text.jsonl"]
    assert main(["sparsify", str(FIXTURES / "base"), *words, "-o", str(tmp_path / "out")]) == 2
    assert "--calibration: is of no use to --method magnitude" in capsys.readouterr().err
