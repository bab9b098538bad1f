"""Anatomy: which tensors are what, found from names, shapes and config alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from structures import LAYERS, STRUCTURES, load
from surgery.anatomy import PART_ORDER, anatomy, find_stacks, split_layer
from surgery.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from surgery.errors import CheckpointError

PREFIXES = {
    "gpt2": "transformer.h",
    "falcon": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "gemma3": "language_model.model.layers",
    "llava": "language_model.model.layers",
    "bert": "bert.encoder.layer",
}
TIED = {
    "llama_tied", "qwen3", "gemma2", "gemma3_text", "gpt2", "falcon", "starcoder2", "smollm3",
    "cohere2", "gemma3", "bert",
}  # fmt: skip
EXPERTS = {"mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next"}
TOWERS = {
    "gemma3": ["vision_tower.encoder.layers"],
    "llava": ["vision_tower.encoder.layers"],
    "qwen2_vl": ["visual.blocks", "visual.merger.mlp"],
}


@pytest.fixture(scope="module")
def parts(structure):
    return lambda name: anatomy(open_checkpoint(structure(name)))


def stored(path, name):
    with safe_open(path / "model.safetensors", "pt") as file:
        return file.get_tensor(name)


def fake(names, config=None, *, shape=(8, 4)):
    """A checkpoint with no file behind it."""
    path = Path("/nowhere/model.safetensors")
    shapes = names if isinstance(names, dict) else dict.fromkeys(names, shape)
    tensors = {
        name: TensorInfo(name, "F32", size, path, 0, 4 * torch.Size(size).numel())
        for name, size in shapes.items()
    }
    return Checkpoint(
        ref="nowhere", root=path.parent, tensors=tensors, files=(path,), config=config,
        bare=config is None,
    )  # fmt: skip


def layers(count, prefix="model.layers"):
    return [f"{prefix}.{i}.mlp.weight" for i in range(count)]


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_layers_are_found(name, parts):
    found = parts(name)
    assert found.stack.prefix == PREFIXES.get(name, "model.layers")
    assert (found.layers, found.extra_layers) == (LAYERS, 0)
    assert found.layer_key in ("num_hidden_layers", "n_layer")
    assert found.section == (("text_config",) if name in TOWERS else ())


@pytest.mark.parametrize("name", STRUCTURES)
def test_other_towers_are_told_apart(name, parts):
    assert [stack.prefix for stack in parts(name).other_stacks] == TOWERS.get(name, [])


@pytest.mark.parametrize("name", STRUCTURES)
def test_embedding_and_head_are_those_of_transformers(name, parts, structure):
    model, _ = load(name, structure(name))
    found = parts(name)
    embedding = model.get_input_embeddings().weight
    assert torch.equal(stored(structure(name), found.embedding), embedding)
    output = model.get_output_embeddings().weight
    assert found.tied == (name in TIED) == (output.data_ptr() == embedding.data_ptr())
    if found.tied:
        assert found.head is None
    else:
        assert torch.equal(stored(structure(name), found.head), output)


@pytest.mark.parametrize("name", STRUCTURES)
def test_no_head_is_lost(name, parts):
    assert not parts(name).lost_head


@pytest.mark.parametrize("name", STRUCTURES)
def test_experts_are_counted(name, parts):
    assert parts(name).experts == (4 if name in EXPERTS else 0)


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_tensor_has_one_part_and_the_parts_sum_to_the_whole(name, parts, structure):
    base, found = open_checkpoint(structure(name)), parts(name)
    sizes = dict.fromkeys(PART_ORDER, 0)
    for key, tensor in base.tensors.items():
        sizes[found.part(key)] += tensor.numel
    total = 0
    with safe_open(structure(name) / "model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            total += file.get_tensor(key).numel()
    assert sum(sizes.values()) == total
    assert all(sizes[part] for part in ("embedding", "attention", "norms"))
    assert (sizes["head"] > 0) == (found.head is not None)
    assert (sizes["experts"] > 0) == (name in EXPERTS)
    assert (sizes["other towers"] > 0) == (name in TOWERS)


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_tensor_of_a_layer_is_located(name, parts, structure):
    base, found = open_checkpoint(structure(name)), parts(name)
    for key in base.tensors:
        inside = found.locate(key)
        if inside is None:
            assert not key.startswith(f"{found.stack.prefix}.")
        else:
            assert found.stack.name(*inside) == key
            assert inside[1] in found.stack.layers[inside[0]]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen3_next", "gpt_neox"])
def test_a_bare_file_has_the_same_layers(name, structure, parts):
    bare = anatomy(open_checkpoint(structure(name) / "model.safetensors"))
    assert bare.stack == parts(name).stack
    assert (bare.family, bare.layer_key) == ("unknown", None)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("model.layers.12.mlp.weight", (12, "mlp.weight")),
        ("model.layers.0.a", (0, "a")),
        ("model.layers.00.a", None),
        ("model.layers.-1.a", None),
        ("model.layers.+1.a", None),
        ("model.layers.1_0.a", None),
        ("model.layers. 1.a", None),
        ("model.layers.\u0661.a", None),
        ("model.layers.\u00b2.a", None),
        ("model.layers.99999999.a", None),
        ("model.layers.1", None),
        ("model.layers.1.", None),
        ("model.layersX.1.a", None),
        ("xmodel.layers.1.a", None),
        ("", None),
        ("model.layers.", None),
    ],
)
def test_names_are_split_by_plain_numbers_only(name, split):
    assert split_layer(name, "model.layers") == split


@pytest.mark.parametrize(
    "name",
    ["model.layers.00.mlp.weight", "model.layers.007.x", "model.layers.-1.x", "model.layers.3",
     "model.layers.99999999999.x", "model.layers.\u0661.x"],
)  # fmt: skip
def test_numbers_that_cannot_be_a_layers_are_refused(name):
    with pytest.raises(CheckpointError, match="whose layer number cannot be one"):
        anatomy(fake([*layers(4), name]))


@pytest.mark.parametrize("names", [[], ["a"], ["weight", "model.norm.weight"], ["0.1", "1.0"]])
def test_a_file_without_layers_is_refused(names):
    with pytest.raises(CheckpointError, match="holds no numbered layers"):
        anatomy(fake(names))


def test_a_gap_in_the_numbers_is_refused():
    with pytest.raises(CheckpointError, match=r"no tensors of layer model\.layers\.2"):
        anatomy(fake([n for n in layers(5) if ".2." not in n], {"num_hidden_layers": 4}))


def test_a_missing_start_is_refused():
    with pytest.raises(CheckpointError, match=r"no tensors of layer model\.layers\.0"):
        anatomy(fake([n for n in layers(5) if ".0." not in n], {"num_hidden_layers": 4}))


@pytest.mark.parametrize("told", [3, 5, 1])
def test_a_config_that_disagrees_is_refused_with_what_there_is(told):
    with pytest.raises(CheckpointError) as refused:
        anatomy(fake([*layers(4), *layers(2, "vision.blocks"), "x", "y"], _config(told)))
    message = f"num_hidden_layers = {told}, but the tensors show model.layers with 4"
    assert message in str(refused.value)
    assert "vision" not in str(refused.value)


@pytest.mark.parametrize("told", [0, -1, True, "4", 4.0, None, [4], 10**30])
def test_a_number_of_layers_that_is_none_is_refused(told):
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        anatomy(fake(layers(4), _config(told)))


def test_a_config_without_a_number_of_layers_is_refused():
    with pytest.raises(CheckpointError, match="does not say how many layers there are"):
        anatomy(fake(layers(4), {"model_type": "llama"}))


def test_an_encoder_decoder_is_refused():
    with pytest.raises(CheckpointError, match="which has two stacks of layers"):
        anatomy(fake(layers(4), _config(4) | {"is_encoder_decoder": True}))


def test_a_bare_encoder_decoder_is_refused():
    names = [*layers(4, "encoder.block"), *layers(4, "decoder.block")]
    with pytest.raises(CheckpointError, match="two series of layers of like size") as refused:
        anatomy(fake(names))
    assert "config.json" in str(refused.value)


def test_a_small_series_beside_the_layers_does_not_matter():
    found = anatomy(fake([*layers(8), *layers(2, "connector.layers")]))
    assert found.stack.prefix == "model.layers"
    assert [stack.prefix for stack in found.other_stacks] == ["connector.layers"]


@pytest.mark.parametrize("key", ["text_config", "language_config", "llm_config"])
def test_the_language_model_is_taken_though_the_vision_tower_is_larger(key):
    shapes = dict.fromkeys(layers(4, "language_model.layers"), (8, 4))
    shapes |= dict.fromkeys(layers(4, "vision_tower.layers"), (800, 4))
    found = anatomy(fake(shapes, {"model_type": "vlm", key: {"num_hidden_layers": 4}}))
    assert found.stack.prefix == "language_model.layers"
    assert found.section == (key,)


def test_a_nested_config_may_leave_the_number_to_its_default():
    """LLaVA 1.5's text_config names only what differs from Vicuna's defaults."""
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}}
    found = anatomy(fake(layers(4, "language_model.model.layers"), config))
    assert (found.layers, found.layer_key) == (4, "num_hidden_layers")


def test_a_list_of_kinds_may_stand_for_the_number():
    """Nemotron-H as transformers saves it."""
    kinds = ["linear_attention", "moe"] * 2
    found = anatomy(fake(layers(4), {"model_type": "nemotron_h", "layers_block_type": kinds}))
    assert (found.layers, found.layer_key) == (4, None)


@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "num_mtp_layers"])
def test_predictors_behind_the_layers_are_counted_apart(key):
    found = anatomy(fake(layers(5), _config(4) | {key: 1}))
    assert (found.layers, found.extra_layers) == (4, 1)


def test_predictors_that_are_not_stored_are_not_counted():
    found = anatomy(fake(layers(4), _config(4) | {"num_nextn_predict_layers": 1}))
    assert (found.layers, found.extra_layers) == (4, 0)


def test_more_layers_than_predictors_explain_are_refused():
    with pytest.raises(CheckpointError, match="but the tensors show"):
        anatomy(fake(layers(6), _config(4) | {"num_nextn_predict_layers": 1}))


def test_stacks_keep_the_order_of_first_appearance():
    found = find_stacks(["b.1.x", "a.0.x", "b.0.x", "c.weight", "b.1.experts.3.w"])
    assert [(s.prefix, list(s.layers)) for s in found] == [("b", [0, 1]), ("a", [0])]
    assert found[0].layers[1] == ("experts.3.w", "x")


def test_a_lost_head_is_noticed(structure):
    """An untied model without its head would load with a random one."""
    base = open_checkpoint(structure("llama"))
    tensors = {name: t for name, t in base.tensors.items() if name != "lm_head.weight"}
    found = anatomy(replace(base, tensors=tensors))
    assert found.lost_head
    assert not found.tied


def test_anatomy_imports_no_torch():
    import subprocess
    import sys

    code = "import sys, surgery.anatomy; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_config_of_each_structure_is_left_alone(structure):
    for name in STRUCTURES:
        before = (structure(name) / "config.json").read_text()
        base = open_checkpoint(structure(name))
        anatomy(base)
        assert base.config == json.loads(before)


def _config(told):
    return {"model_type": "llama", "num_hidden_layers": told}
