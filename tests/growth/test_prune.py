"""Dropping layers: what is left is the source's own, closes up, and loads whole."""

from __future__ import annotations

import json

import pytest
import torch
from layer_oracle import (
    depth,
    generated,
    logits,
    moved,
    same_bits,
    source_name,
    stored,
    text_of,
)

from growth.prune import prune
from structures import STRUCTURES, is_decoder, load
from surgery.errors import PlanError, RecipeError

DROPS = {"1": [0, 2, 3], "1-2": [0, 3], "3,2": [0, 1], "0": [1, 2, 3]}
CASES = [(name, layers) for name in STRUCTURES for layers in DROPS]


@pytest.fixture(scope="session")
def pruned(opened, write):
    made = {}

    def get(name, layers):
        if (name, layers) not in made:
            path = write(prune(opened(name), layers=layers))
            made[name, layers] = (path, *load(name, path))
        return made[name, layers]

    return get


@pytest.mark.parametrize(("name", "layers"), CASES)
def test_loads_with_no_missing_unexpected_or_mismatched_key(name, layers, pruned):
    assert {key: value for key, value in pruned(name, layers)[2].items() if value} == {}


@pytest.mark.parametrize(("name", "layers"), CASES)
def test_what_is_left_is_the_sources_own(name, layers, pruned, structure):
    path, model, _ = pruned(name, layers)
    before, after = stored(structure(name)), stored(path)
    kept = DROPS[layers]
    assert all(same_bits(after[n], before[source_name(n, kept)]) for n in after)
    assert depth(model.config) == len(kept)
    left = {source_name(n, kept) for n in after}
    record = json.loads((path / "surgery.json").read_text())
    assert set(before) - left == set(record["dropped"])
    gone = {int(why.split()[1]) for why in record["dropped"].values()}
    assert gone == set(range(4)) - set(kept)


@pytest.mark.parametrize(("name", "layers"), CASES)
def test_computes_what_the_layers_left_compute(name, layers, pruned, parent):
    expected = moved(parent(name), DROPS[layers])
    assert torch.equal(logits(pruned(name, layers)[1]), logits(expected))
    if is_decoder(name):
        assert generated(pruned(name, layers)[1]) == generated(expected)


@pytest.mark.parametrize("name", ["gemma3_text", "smollm3", "qwen3_next", "gemma3", "qwen2"])
def test_lists_of_the_config_move_with_their_layers(name, pruned, parent):
    before = text_of(parent(name).config).layer_types
    assert text_of(pruned(name, "1")[1].config).layer_types == [before[i] for i in DROPS["1"]]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("0-3", "leaves no layer"),
        ("4", "names layer 4, but the model has layers 0 to 3"),
        ("2-9", "names layer 4"),
        ("2-1", "runs backwards"),
        ("", "is neither a layer nor a range"),
        ("x", "is neither"),
        ("-1", "is neither"),
    ],
)
def test_senseless_asks_are_refused(layers, message, opened):
    with pytest.raises(RecipeError, match=message):
        prune(opened("llama"), layers=layers)


def test_naming_a_layer_twice_drops_it_once(opened):
    assert prune(opened("llama"), layers="1,1,0-1").facts["layer_map"] == [2, 3]


def test_dropping_the_dense_layer_of_deepseek_leaves_none(opened):
    assert prune(opened("deepseek_v3"), layers="0").config["first_k_dense_replace"] == 0


def test_a_map_that_drops_layers_is_what_prune_does(opened):
    from growth.stack import stack

    pruned, stacked = prune(opened("llama"), layers="1"), stack(opened("llama"), layers="0,2-3")
    assert (pruned.config, pruned.order) == (stacked.config, stacked.order)
    assert pruned.dropped == stacked.dropped


def test_a_layer_whose_number_matters_cannot_move_up(opened):
    base = opened("gpt2")
    base.config["scale_attn_by_inverse_layer_idx"] = True
    try:
        assert prune(base, layers="3").config["n_layer"] == 3
        with pytest.raises(PlanError, match="divides attention by the layer's number"):
            prune(base, layers="0")
    finally:
        base.config["scale_attn_by_inverse_layer_idx"] = False
