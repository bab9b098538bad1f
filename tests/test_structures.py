"""The structure fixtures are what they claim to be."""

from __future__ import annotations

import json
import re
from collections import defaultdict

import pytest
import torch
from safetensors import safe_open

from architectures import LAYERS
from structures import (
    STRUCTURES,
    build,
    example_inputs,
    is_decoder,
    load,
    markers,
)

DECODERS = [name for name in STRUCTURES if is_decoder(name)]
PER_EXPERT = ["mixtral", "qwen3_moe", "deepseek_v3", "qwen3_next"]


def tensors(directory):
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


@pytest.mark.parametrize("name", STRUCTURES)
def test_loads_with_no_missing_unexpected_or_mismatched_key(name, structure):
    _, info = load(name, structure(name))
    assert {key: value for key, value in info.items() if value} == {}


@pytest.mark.parametrize("name", STRUCTURES)
def test_logits_are_finite(name, structure):
    model, _ = load(name, structure(name))
    with torch.no_grad():
        assert model(**example_inputs(name)).logits.isfinite().all()


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_generates_four_tokens(name, structure):
    model, _ = load(name, structure(name))
    inputs = example_inputs(name)
    tokens = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens.shape == (2, inputs["input_ids"].shape[1] + 4)


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_names_that_make_it_what_it_is_are_on_disk(name, structure):
    assert set(markers(name)) <= set(tensors(structure(name)))


@pytest.mark.parametrize("name", PER_EXPERT)
def test_experts_are_stored_one_by_one(name, structure):
    experts = [key for key in tensors(structure(name)) if ".experts." in key]
    assert experts
    assert all(re.search(r"\.experts\.[0-3]\.\w+\.weight$", key) for key in experts)


@pytest.mark.parametrize("name", STRUCTURES)
def test_no_stored_vector_is_constant(name, structure):
    constant = [
        key
        for key, value in tensors(structure(name)).items()
        if value.ndim == 1 and value.numel() > 1 and (value == value[0]).all()
    ]
    assert constant == []


@pytest.mark.parametrize("name", STRUCTURES)
def test_no_two_layers_share_a_tensor(name, structure):
    siblings = defaultdict(list)
    for key, value in tensors(structure(name)).items():
        siblings[re.sub(r"\.\d+\.", ".*.", key, count=1), value.shape].append(value)
    for group in siblings.values():
        assert len({value.numpy().tobytes() for value in group}) == len(group)


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_config_says_four_layers_and_lists_say_the_same(name, structure):
    config = json.loads((structure(name) / "config.json").read_text())
    text = config.get("text_config", config)
    assert text.get("num_hidden_layers", text.get("n_layer")) == LAYERS
    assert len(text.get("layer_types") or [None] * LAYERS) == LAYERS


@pytest.mark.parametrize("name", STRUCTURES)
def test_weights_are_the_same_at_every_build(name, structure, tmp_path):
    again = build(name, tmp_path) / "model.safetensors"
    assert again.read_bytes() == (structure(name) / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", DECODERS)
def test_the_order_of_layers_shows_in_the_logits(name, structure):
    model, _ = load(name, structure(name))
    layers = next(
        module
        for key, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == LAYERS and "vis" not in key
    )
    with torch.no_grad():
        before = model(**example_inputs(name), use_cache=False).logits
        for parameter, other in zip(layers[0].parameters(), layers[3].parameters(), strict=False):
            if parameter.shape == other.shape:
                parameter.data, other.data = other.data, parameter.data
        after = model(**example_inputs(name), use_cache=False).logits
    assert (before - after).abs().max() > 1e-2


def test_tokenizer_gives_one_token_a_byte(structure):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(structure("llama"))
    text = "naïve — 你好\n"
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_shards_have_an_index(tmp_path):
    sharded = build("llama", tmp_path, max_shard_size="20KB")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
