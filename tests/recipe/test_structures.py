"""Recipes on every way that a model lays out its tensors: the result loads, nothing is missing."""

import json
import shutil

import pytest
import torch
from recipes import compiled
from safetensors.torch import load_file, save_file

from growth.stack import stack
from structures import STRUCTURES, load
from surgery.checkpoint import open_checkpoint
from surgery.errors import PlanError
from surgery.run import run

TYPED = {"qwen3", "gemma3_text", "smollm3", "gpt_oss", "qwen3_next"}  # layers of several kinds
SLICED = ("llama", "llama_tied", "gpt2", "gemma3", "deepseek_v3", *sorted(TYPED))


@pytest.fixture
def pair(structure, tmp_path):
    """A structure, and a copy with every weight times 1.5."""

    def get(name):
        other = shutil.copytree(structure(name), tmp_path / "other")
        tensors = load_file(other / "model.safetensors")
        scaled = {k: t * 1.5 if t.is_floating_point() else t for k, t in tensors.items()}
        save_file(scaled, other / "model.safetensors", metadata={"format": "pt"})
        return structure(name), other

    return get


def made(text, out):
    plan = compiled(text).plan
    run(plan, out)
    return plan


def loads(name, out):
    model, info = load(name, out)
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize("name", STRUCTURES)
def test_an_average_loads_and_is_one(name, pair, tmp_path):
    one, other = pair(name)
    made(
        f"""
        models:
          - {{model: {one}, parameters: {{weight: 1}}}}
          - {{model: {other}, parameters: {{weight: 3}}}}
        merge_method: linear
        """,
        tmp_path / "out",
    )
    loads(name, tmp_path / "out")
    before = load_file(one / "model.safetensors")
    after = load_file(tmp_path / "out/model.safetensors")
    assert after.keys() == before.keys()
    for tensor, found in after.items():
        wanted = before[tensor] * (1.375 if found.is_floating_point() else 1)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", SLICED)
def test_slices_of_two_models_load_with_their_layers(name, pair, tmp_path):
    one, other = pair(name)
    plan = made(
        f"""
        slices:
          - sources: [{{model: {one}, layer_range: [0, 3]}}]
          - sources: [{{model: {other}, layer_range: [1, 4]}}]
        merge_method: passthrough
        """,
        tmp_path / "out",
    )
    text = loads(name, tmp_path / "out").config.get_text_config()
    assert text.num_hidden_layers == 6
    assert plan.facts["layer_map"] == [0, 1, 2, 1, 2, 3]
    if name in TYPED:
        told = json.loads((one / "config.json").read_text())["layer_types"]
        assert text.layer_types == [told[n] for n in (0, 1, 2, 1, 2, 3)]


def test_a_layer_that_the_config_cannot_move_is_refused(pair):
    one, _ = pair("deepseek_v3")
    with pytest.raises(PlanError, match="first_k_dense_replace: cannot say"):
        compiled(f"""
            slices:
              - sources: [{{model: {one}, layer_range: [0, 2]}}]
              - sources: [{{model: {one}, layer_range: [0, 4]}}]
            merge_method: passthrough
        """)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt_neox", "mixtral", "qwen2_vl"])
def test_slices_of_one_model_are_what_stack_makes(name, structure, tmp_path):
    model = structure(name)
    made(
        f"""
        slices:
          - sources: [{{model: {model}, layer_range: [0, 4]}}]
          - sources: [{{model: {model}, layer_range: [0, 4]}}]
        merge_method: passthrough
        """,
        tmp_path / "out",
    )
    run(stack(open_checkpoint(model), factor=2), tmp_path / "stacked")
    one, two = (
        (load_file(tmp_path / d / "model.safetensors"), (tmp_path / d / "config.json").read_text())
        for d in ("out", "stacked")
    )
    assert one[1] == two[1]
    assert one[0].keys() == two[0].keys()
    assert all(torch.equal(tensor, two[0][name]) for name, tensor in one[0].items())


def test_layers_of_another_kind_are_refused(pair):
    one, other = pair("gemma3_text")
    types = json.loads((one / "config.json").read_text())["layer_types"]
    at = next(n for n, kind in enumerate(types[1:]) if kind != types[n])
    with pytest.raises(PlanError, match=r"is 'full_attention', not .*; take layers"):
        compiled(f"""
            slices:
              - sources:
                  - {{model: {one}, layer_range: [{at}, {at + 1}]}}
                  - {{model: {other}, layer_range: [{at + 1}, {at + 2}]}}
            merge_method: linear
            parameters: {{weight: 1}}
        """)
