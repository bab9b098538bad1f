"""Loops, ranks, what is told, and what is refused before anything is read."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from growth.recurse.factor import METHODS, factorise
from growth.recurse.formats import replication
from growth.recurse.loops import evenly, lay_loops
from growth.recurse.telling import captured
from growth.recurse.tying import relax, tie
from growth.recurse.unroll import materialize, untie
from surgery.checkpoint import open_checkpoint
from surgery.errors import CheckpointError, PlanError, RecipeError


@pytest.mark.parametrize(
    ("asked", "layer_map", "sources"),
    [
        ((6, 2, "cycle", "stepwise"), (0, 1, 2, 0, 1, 2), ((0,), (2,), (5,))),
        ((6, 2, "cycle", "average"), (0, 1, 2, 0, 1, 2), ((0, 3), (1, 4), (2, 5))),
        ((6, 3, "cycle", "lower"), (0, 1, 0, 1, 0, 1), ((0,), (1,))),
        ((6, 2, "sequence", "average"), (0, 0, 1, 1, 2, 2), ((0, 1), (2, 3), (4, 5))),
        ((6, 2, "middle-cycle", "average"), (0, 1, 2, 1, 2, 3), ((0,), (1, 3), (2, 4), (5,))),
        ((6, 2, "middle-cycle", "stepwise"), (0, 1, 2, 1, 2, 3), ((0,), (1,), (4,), (5,))),
        ((4, 4, "cycle", "stepwise"), (0, 0, 0, 0), ((0,),)),
    ],
)
def test_loops_by_scheme_and_start(asked, layer_map, sources):
    layers, blocks, scheme, init = asked
    found = lay_loops(layers, blocks=blocks, scheme=scheme, init=init)
    assert found.layer_map == layer_map
    assert found.sources == sources


@pytest.mark.parametrize(("last", "count"), [(17, 9), (5, 3), (31, 16), (11, 4)])
def test_stepwise_is_even_with_fixed_ends(last, count):
    found = evenly(0, last, count)
    assert (found[0], found[-1], len(found)) == (0, last, count)
    exact = [i * last / (count - 1) for i in range(count)]
    assert all(abs(a - b) <= 0.5 for a, b in zip(found, exact, strict=True))


def test_replication_is_runs_of_layers():
    assert replication([0, 1, 0, 1]) == [[0, 2], [0, 2]]
    assert replication([0, 0, 1, 1]) == [[0, 1], [0, 2], [1, 2]]
    assert replication([0, 1, 1, 2]) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_factors_are_the_best_of_their_rank(method, shape):
    seed = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=seed) * torch.linspace(4, 0.1, shape[1])
    found = factorise(matrix, 8, method=method, seed="x")
    _, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    best = float(s[8:].square().sum())
    lost = float((matrix - found.b @ found.a).double().square().sum())
    assert lost <= best * (1.01 if method == "randomized" else 1 + 1e-6)
    assert found.whole - found.kept == pytest.approx(lost, rel=1e-4)
    assert torch.allclose(found.a.double() @ found.a.double().T, torch.eye(8).double(), atol=1e-5)
    if method != "randomized":
        assert torch.allclose(found.b.double().norm(dim=0), s[:8], rtol=1e-5)
        assert torch.allclose((found.a.double() * v[:8]).sum(1).abs(), torch.ones(8).double())


def test_no_residual_gives_a_random_and_b_zero(relaxed):
    from safetensors.torch import load_file

    found = load_file(relaxed("llama", init="stepwise", rank=4) / "model.safetensors")
    a, b = (found[f"model.layers.0.self_attn.q_proj.lora_{part}.weight"] for part in "AB")
    assert not b.any()
    assert 0.2 / 4 < float(a.std()) < 2 / 4
    assert found["model.layers.1.self_attn.q_proj.lora_B.weight"].any()


def test_energy_keeps_what_is_asked(opened, write):
    plan = relax(opened("llama"), blocks=2, energy=0.8)
    told = json.loads((write(plan) / "surgery.json").read_text())["told"]
    assert len(told) == 2 * 7
    assert all(figures["energy"] >= 0.8 for figures in told.values())
    ranks = {rank for own in plan.facts["ranks"].values() for rank in own}
    assert len(ranks) > 1
    figures = captured(plan, told)
    assert {row["module"] for row in figures["modules"]} == set(plan.facts["ranks"])
    shares = [row["share_of_the_difference_kept"] for row in figures["modules"]]
    assert all(0.8 <= share <= 1 for share in (*shares, figures["energy_in_all"]))


def test_a_depth_with_a_block_of_its_own_has_no_factors(opened):
    plan = relax(opened("llama"), blocks=2, rank=4, scheme="middle-cycle")
    assert plan.facts["ranks"]["self_attn.q_proj"] == [0, 4, 4, 0]


def test_the_ratio_is_that_of_the_parameters(opened):
    base = opened("llama")
    plan = relax(base, blocks=2, rank=4)
    before = sum(tensor.numel for tensor in base.tensors.values())
    after = sum(spec.numel for spec in plan.outputs.values())
    assert plan.facts["parameter_ratio"] == after / before
    assert any(f"{after / before:.1%} of the model's parameters" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"rank": 30}, "take more than a dense difference would"),
        ({"rank": 4, "init": "stepwise"}, "stepwise starts with factors did worse"),
        ({"rank": 64}, "no rank is above a matrix's shorter side"),
    ],
)
def test_what_is_unwise_is_told(asked, words, opened):
    assert any(words in note for note in relax(opened("llama"), blocks=2, **asked).notes)


def test_kinds_that_do_not_repeat_are_kept_and_told(opened):
    plan = tie(opened("qwen2"), blocks=2)
    assert any("each depth keeps its own kind" in note for note in plan.notes)
    same = tie(opened("gemma3_text"), blocks=2)
    assert not any("its own kind" in note for note in same.notes)


@pytest.mark.parametrize(
    ("name", "asked", "error", "words"),
    [
        ("llama", {"blocks": 3, "rank": 4}, RecipeError, "does not divide the model's 4 layers"),
        ("llama", {"blocks": 1, "rank": 4}, RecipeError, "ties nothing"),
        ("llama", {"blocks": 0, "rank": 4}, RecipeError, "ties nothing"),
        ("llama", {"blocks": 8, "rank": 4}, RecipeError, "does not divide"),
        (
            "llama",
            {"blocks": 4, "rank": 4, "scheme": "middle-cycle"},
            RecipeError,
            "2 layers between first and last",
        ),
        ("llama", {"blocks": 2, "rank": 0}, RecipeError, "is below 1"),
        ("llama", {"blocks": 2}, RecipeError, "needs --rank or --energy"),
        ("llama", {"blocks": 2, "energy": 2.0}, RecipeError, "outside"),
        ("llama", {"blocks": 2, "rank": 4, "init": "upper"}, RecipeError, "is none of"),
        ("llama", {"blocks": 2, "rank": 4, "scheme": "round"}, RecipeError, "is none of"),
        ("llama", {"blocks": 2, "rank": 4, "svd": "qr"}, RecipeError, "is none of"),
        (
            "llama",
            {"blocks": 2, "rank": 4, "device": "tpu"},
            RecipeError,
            "is not a device of this machine",
        ),
        ("llama", {"blocks": 2, "rank": 4, "format": "gguf"}, RecipeError, "is none of"),
        ("llama", {"blocks": 2, "rank": 4, "format": "peft"}, RecipeError, "has no part"),
        ("llama", {"blocks": 2, "rank": 4, "part": "base"}, RecipeError, "has no part"),
        ("mixtral", {"blocks": 2, "rank": 4}, PlanError, "experts"),
        ("bert", {"blocks": 2, "rank": 4}, PlanError, "no causal language model"),
        ("gpt2", {"blocks": 2, "rank": 4}, PlanError, "has its layers at transformer.h"),
        ("gemma3", {"blocks": 2, "rank": 4}, PlanError, "towers"),
        *(
            (
                name,
                {"blocks": 2, "rank": 4, "format": "peft", "part": "base"},
                PlanError,
                words,
            )
            for name, words in (
                ("qwen2", "is exact for llama and mistral alone"),
                ("qwen3", "is exact for llama and mistral alone"),
                ("gemma3_text", "is exact for llama and mistral alone"),
                ("olmo2", "is exact for llama and mistral alone"),
                ("llama_bias", "per depth, which layers that peft repeats share"),
            )
        ),
    ],
)
def test_senseless_asks_are_refused(name, asked, error, words, opened):
    with pytest.raises(error, match=words):
        relax(opened(name), **asked)


def test_what_is_recursive_is_not_made_so_again(tied):
    with pytest.raises(PlanError, match="is recursive already"):
        tie(open_checkpoint(tied("llama")), blocks=2)


@pytest.mark.parametrize("back", [materialize, untie])
def test_only_recursive_models_are_unrolled(back, opened):
    with pytest.raises(PlanError, match="is no recursive model"):
        back(opened("llama"))


def test_untying_wants_a_part_where_there_are_factors(relaxed, tied):
    with pytest.raises(RecipeError, match="has the parts base and adapter"):
        untie(open_checkpoint(relaxed("llama", rank=3)))
    with pytest.raises(RecipeError, match="has no parts"):
        untie(open_checkpoint(tied("llama")), part="adapter")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer_map": [0, 1]}, "layer_map of 2 for 4 layers"),
        ({"layer_map": "cycle"}, "has no usable layer_map"),
        ({"layer_map": [0, 1, 2, 0]}, "has no tensor"),
        ({"base_model_type": None}, "does not say what model"),
    ],
)
def test_a_damaged_config_is_refused(change, words, tied, tmp_path):
    path = tmp_path / "broken"
    shutil.copytree(tied("llama"), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=words):
        materialize(open_checkpoint(path))


@pytest.mark.gpu
def test_cuda_finds_the_same_factors(opened, write):
    made = [write(relax(opened("llama"), blocks=2, rank=4, device=d)) for d in ("cpu", "cuda")]
    told = [json.loads((path / "surgery.json").read_text())["told"] for path in made]
    for name, figures in told[0].items():
        assert figures["energy"] == pytest.approx(told[1][name]["energy"], rel=1e-4)


@pytest.mark.parametrize(("svd", "told"), [("randomized", True), ("gram", False), (None, False)])
def test_that_sketches_may_miss_the_energy_is_noted(svd, told, opened):
    plan = relax(opened("llama"), blocks=2, energy=0.9, svd=svd)
    assert any("may keep a little less" in note for note in plan.notes) is told
