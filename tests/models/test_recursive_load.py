"""Tied checkpoints load whole, tied, equal to the unrolled model, and in no other way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from recursion import FAMILIES, MAP, OTHERS, REPO, open_tied, prompt, tied_parameters, write
from safetensors.torch import load_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

KINDS = ("plain", "relaxed")
CASES = [(family, kind) for family in FAMILIES for kind in KINDS]
EMPTY = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
FRESH = """
import sys, torch, transformers
model, info = transformers.AutoModelForCausalLM.from_pretrained(
    sys.argv[1], trust_remote_code=True, output_loading_info=True)
layers = model.model.layers
told = [info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")]
same = layers[0].mlp.up_proj.weight.data_ptr() == layers[2].mlp.up_proj.weight.data_ptr()
ids = torch.tensor([[5, 6, 7, 8]])
print([len(keys) for keys in told], same, model(ids).logits.double().sum().item())
"""


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_every_stored_tensor_finds_its_place(tied, family, kind):
    _, info = open_tied(tied(family, kind).path, output_loading_info=True)
    assert {key: info[key] for key in EMPTY} == EMPTY


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_layers_of_one_block_hold_the_same_parameters(recursive, family, kind):
    places = tied_parameters(recursive(family, kind))
    for name, place in places.items():
        depth, key = name.split(".", 1)
        shared = (
            not key.endswith(("norm.weight", "layernorm.weight", ".bias")) and "lora" not in key
        )
        twins = [d for d, block in enumerate(MAP) if places.get(f"{d}.{key}") == place]
        assert twins == (
            [d for d in range(4) if MAP[d] == MAP[int(depth)]] if shared else [int(depth)]
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_unrolled_models(tied, recursive, family):
    ids = prompt(family)
    with torch.no_grad():
        assert torch.equal(recursive(family)(ids).logits, tied(family).unrolled(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_low_rank_terms_are_those_of_w_plus_b_a(tied, recursive, family):
    ids = prompt(family)
    with torch.no_grad():
        found = recursive(family, "relaxed")(ids).logits
        expected = tied(family, "relaxed").unrolled(ids).logits
    assert (found - expected).abs().max() <= 2e-6


@pytest.mark.parametrize("family", OTHERS)
def test_other_decoders_need_no_code_of_their_own(tmp_path, family):
    # The dense layer of this mixture of experts is its second; a block is of one kind.
    layer_map = (0, 1, 0, 2) if family == "qwen3_moe" else MAP
    recursion, ids = write(family, tmp_path, layer_map=layer_map), prompt(family)
    model, info = open_tied(recursion.path, output_loading_info=True)
    assert {key: info[key] for key in EMPTY} == EMPTY
    with torch.no_grad():
        assert torch.equal(model(ids).logits, recursion.unrolled(ids).logits)
    model.save_pretrained(tmp_path / "again")
    stored = load_file(tmp_path / "again" / "model.safetensors")
    assert stored.keys() == recursion.stored.keys()
    assert all(torch.equal(stored[name], recursion.stored[name]) for name in stored)


def test_a_block_of_two_kinds_of_layer_is_refused(tmp_path):
    path = write("qwen3_moe", tmp_path, layer_map=(0, 1, 0, 2)).path
    told = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(told | {"layer_map": [0, 1, 0, 1]}))
    with pytest.raises(ValueError, match="layers 1 and 3 differ in mlp"):
        open_tied(path)


def test_norms_tie_too_where_no_depth_has_its_own(tmp_path):
    recursion = write("qwen3", tmp_path, own=False)
    model, info = open_tied(recursion.path, output_loading_info=True)
    ids = prompt("qwen3")
    assert {key: info[key] for key in EMPTY} == EMPTY
    assert not any(name.startswith("model.layers.2.") for name in recursion.stored)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, recursion.unrolled(ids).logits)


def test_a_fresh_process_loads_it_tied(tied, recursive):
    path = tied("llama", "relaxed").path
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(path.parent / "home")}
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(path)],
        capture_output=True, text=True, timeout=120, env=env, cwd=path.parent, check=True,
    )  # fmt: skip
    with torch.no_grad():
        logits = recursive("llama", "relaxed")(torch.tensor([[5, 6, 7, 8]])).logits
    assert done.stdout.split() == ["[0,", "0,", "0]", "True", str(logits.double().sum().item())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_takes_the_memory_of_the_stored_tensors(tied, dtype):
    recursion = tied("llama", "relaxed")
    model = open_tied(recursion.path, dtype=dtype)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
    stored = sum(tensor.numel() for tensor in recursion.stored.values()) * dtype.itemsize
    assert sum(storage.nbytes() for storage in storages.values()) == stored
    assert model.num_parameters() * dtype.itemsize == stored


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_saved_again_it_is_the_same_directory(tied, recursive, tmp_path, family, kind):
    before, model = tied(family, kind), recursive(family, kind)
    model.save_pretrained(tmp_path / "again")
    stored = load_file(tmp_path / "again" / "model.safetensors")
    assert stored.keys() == before.stored.keys()
    assert all(torch.equal(stored[name], before.stored[name]) for name in stored)
    reloaded, info = open_tied(tmp_path / "again", output_loading_info=True)
    ids = prompt(family)
    assert {key: info[key] for key in EMPTY} == EMPTY
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, model(ids).logits)


def test_saved_again_its_config_says_what_it_said(tied, recursive, tmp_path):
    recursive("gemma3_text").save_pretrained(tmp_path)
    before = json.loads((tied("gemma3_text").path / "config.json").read_text())
    after = json.loads((tmp_path / "config.json").read_text())
    assert before.items() <= (after | {"text_config": before["text_config"]}).items()
    text = before["text_config"].keys() - {"transformers_version", "tie_word_embeddings"}
    assert {key: after["text_config"][key] for key in text} == {
        key: before["text_config"][key] for key in text
    }


def test_shards_of_a_saved_model_hold_each_shared_tensor_once(tied, recursive, tmp_path):
    recursive("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tied("llama").stored.keys()
    assert open_tied(tmp_path, output_loading_info=True)[1]["missing_keys"] == set()


def test_no_stock_configuration_reads_it(tied):
    loaded = []
    for kind in CONFIG_MAPPING:
        try:
            loaded.append(CONFIG_MAPPING[kind].from_pretrained(tied("llama").path))
        except Exception:
            continue
    assert not loaded


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_again_no_stock_configuration_reads_it(recursive, tmp_path, family):
    recursive(family).save_pretrained(tmp_path)
    for kind in FAMILIES:
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            CONFIG_MAPPING[kind].from_pretrained(tmp_path)


STOCK = (
    "LlamaForCausalLM", "LlamaModel", "MistralForCausalLM", "Qwen2ForCausalLM",
    "Qwen3ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "Olmo2ForCausalLM",
)  # fmt: skip


@pytest.mark.parametrize("stock", STOCK)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_stock_class_loads_it(tied, family, stock):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        getattr(transformers, stock).from_pretrained(tied(family).path)


def test_code_runs_only_where_it_is_trusted(tied):
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForCausalLM.from_pretrained(
            tied("llama").path, trust_remote_code=False
        )


def test_the_file_stands_alone():
    text = (REPO / "surgery" / "models" / "modeling_recursive.py").read_text()
    imports = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
    roots = {line.split()[1].split(".")[0] for line in imports}
    third = roots - set(sys.stdlib_module_names)
    assert third <= {"torch", "transformers", "huggingface_hub"}


WRONG = (
    ("layer_map", [0, 1, 0], "layer_map: 3 entries for 4 layers"),
    ("layer_map", [], "layer_map: 0 entries for 4 layers"),
    ("layer_map", [0, 2, 0, 2], "skips a block"),
    ("per_depth", ["self_attn.z_proj.weight"], "per_depth: self_attn.z_proj.weight is no param"),
    ("lora_ranks", {"mlp.z_proj": [1, 1, 1, 1]}, "lora_ranks: mlp.z_proj is no linear"),
    ("lora_ranks", {"mlp.up_proj": [1, 1]}, "is not one rank for every layer"),
    ("num_loops", 3, r"num_loops: 3 is outside 1\.\.2"),
    ("base_model_type", "lama", "lama is no architecture of transformers"),
    ("base_model_type", "bert", "base_model_type: bert has no plain layers"),
)


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_a_config_that_fits_no_model_is_refused(tied, tmp_path, key, value, message):
    shutil.copytree(tied("llama").path, tmp_path / "wrong")
    told = json.loads((tmp_path / "wrong" / "config.json").read_text())
    (tmp_path / "wrong" / "config.json").write_text(json.dumps(told | {key: value}))
    with pytest.raises(ValueError, match=message):
        open_tied(tmp_path / "wrong")
