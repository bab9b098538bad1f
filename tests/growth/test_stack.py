"""Stacking: on every architecture the result loads whole and is made of the source's own bytes."""

from __future__ import annotations

import json
import subprocess
import sys

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

from growth.stack import stack
from structures import LAYERS, STRUCTURES, build, is_decoder, load
from surgery.checkpoint import open_checkpoint
from surgery.errors import PlanError, RecipeError
from surgery.run import run

ASKS = {
    "abab": {"factor": 2},
    "aabb": {"factor": 2, "order": "aabb"},
    "dus": {"dus": 1},
    "map": {"layers": "0-2,1,3,2-3"},
}
MAPS = {
    "abab": [0, 1, 2, 3, 0, 1, 2, 3],
    "aabb": [0, 0, 1, 1, 2, 2, 3, 3],
    "dus": [0, 1, 2, 1, 2, 3],
    "map": [0, 1, 2, 1, 3, 2, 3],
}
# DeepSeek-V3's config can only say that the first layers are dense, once.
CASES = [(n, how) for n in STRUCTURES for how in ASKS if (n, how) != ("deepseek_v3", "abab")]
DECODERS = [case for case in CASES if is_decoder(case[0])]
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")


@pytest.fixture(scope="session")
def stacked(opened, write):
    """Path, model and loading info of a stacked structure."""
    made = {}

    def get(name, how):
        if (name, how) not in made:
            path = write(stack(opened(name), **ASKS[how]))
            made[name, how] = (path, *load(name, path))
        return made[name, how]

    return get


@pytest.mark.parametrize(("name", "how"), CASES)
def test_loads_with_no_missing_unexpected_or_mismatched_key(name, how, stacked):
    _, _, info = stacked(name, how)
    assert {key: value for key, value in info.items() if value} == {}


@pytest.mark.parametrize(("name", "how"), CASES)
def test_each_tensor_is_its_source_bit_for_bit(name, how, stacked, structure):
    path, model, _ = stacked(name, how)
    before, after = stored(structure(name)), stored(path)
    wrong = [n for n in after if not same_bits(after[n], before[source_name(n, MAPS[how])])]
    assert wrong == []
    assert {source_name(n, MAPS[how]) for n in after} == set(before)
    assert depth(model.config) == len(MAPS[how])


@pytest.mark.parametrize(("name", "how"), CASES)
def test_lists_of_the_config_move_with_their_layers(name, how, stacked, parent):
    before, after = text_of(parent(name).config), text_of(stacked(name, how)[1].config)
    for key in PER_LAYER:
        listed = getattr(before, key, None)
        assert getattr(after, key, None) == (listed and [listed[i] for i in MAPS[how]]), key


@pytest.mark.parametrize(("name", "how"), CASES)
def test_nothing_else_in_the_config_changes(name, how, stacked, parent):
    follows = {*PER_LAYER, "num_hidden_layers", "n_layer", "mlp_only_layers"}
    follows |= {"first_k_dense_replace", "_name_or_path"}
    before, after = (
        {k: v for k, v in text_of(model.config).to_dict().items() if k not in follows}
        for model in (parent(name), stacked(name, how)[1])
    )
    assert before == after


@pytest.mark.parametrize(("name", "how"), CASES)
def test_computes_what_the_moved_layers_compute(name, how, stacked, parent):
    expected = moved(parent(name), MAPS[how])
    assert torch.equal(logits(stacked(name, how)[1]), logits(expected))


@pytest.mark.parametrize(("name", "how"), DECODERS)
def test_generates_what_the_moved_layers_generate(name, how, stacked, parent):
    expected = moved(parent(name), MAPS[how])
    assert generated(stacked(name, how)[1]) == generated(expected)


def test_a_dense_layer_of_deepseek_is_not_moved_behind_experts(opened):
    with pytest.raises(PlanError, match=r"first_k_dense_replace.*layer 4 is to be what layer 0"):
        stack(opened("deepseek_v3"), factor=2)


def test_the_advice_for_deepseek_is_a_map_that_works(opened, write):
    with pytest.raises(PlanError) as refused:
        stack(opened("deepseek_v3"), factor=2)
    layers = str(refused.value).rpartition("--map ")[2]
    _, info = load("deepseek_v3", write(stack(opened("deepseek_v3"), layers=layers)))
    assert not any(info.values())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_bare_file_gives_a_bare_file(name, structure, tmp_path):
    source = structure(name) / "model.safetensors"
    out = run(stack(open_checkpoint(source), factor=2), tmp_path / "out.safetensors").out
    before, after = stored(source), stored(out)
    assert out.is_file()
    assert all(same_bits(after[n], before[source_name(n, MAPS["abab"])]) for n in after)
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]


def test_shards_in_and_out_hold_the_same_tensors(tmp_path, structure):
    sharded = build("llama", tmp_path / "in", max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    out = run(stack(open_checkpoint(sharded), factor=2), tmp_path / "out", shard_size=30_000).out
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    before, after = stored(structure("llama")), stored(out)
    assert all(same_bits(after[n], before[source_name(n, MAPS["abab"])]) for n in after)
    assert not any(load("llama", out)[1].values())


def test_shards_hold_the_layers_in_their_order(opened, tmp_path):
    out = run(stack(opened("llama"), factor=3), tmp_path / "out", shard_size=30_000).out
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    files = [index[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(12)]
    assert files == sorted(files)
    assert len(set(files)) > 4


@pytest.mark.parametrize("name", [name for name in STRUCTURES if name != "deepseek_v3"])
def test_the_oracle_tells_one_map_from_another(name, stacked, parent):
    other = moved(parent(name), [0, 1, 2, 3, 0, 1, 3, 2])
    assert (logits(stacked(name, "abab")[1]) - logits(other)).abs().max() > 1e-3


@pytest.mark.parametrize("bare", [False, True])
def test_the_default_output_stands_beside_the_base(bare, tmp_path):
    base = build("llama", tmp_path / "base")
    asked = base / "model.safetensors" if bare else base
    command = [sys.executable, "-m", "surgery", "stack", str(asked), "--factor", "2"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    out = base / "model-stack2.safetensors" if bare else tmp_path / "base-stack2"
    assert len(stored(out)) == 2 + 1 + 9 * 2 * LAYERS


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        ({"layers": "3-1"}, "the range 3-1 runs backwards; write 1-3"),
        ({"layers": "0-4"}, "names layer 4, but the model has layers 0 to 3"),
        ({"layers": "7"}, "names layer 7"),
        ({"layers": ""}, "'' is neither a layer nor a range"),
        ({"layers": "0,,1"}, "'' is neither a layer nor a range"),
        ({"layers": "0--1"}, "'0--1' is neither"),
        ({"layers": "-1"}, "'-1' is neither"),
        ({"layers": "a"}, "'a' is neither"),
        ({"layers": "0-"}, "'0-' is neither"),
        ({"layers": "\u0661"}, "is neither"),
        ({"layers": "0-\u00b2"}, "is neither"),
        ({"layers": "0-99999999999"}, "is neither"),
        ({"layers": "9" * 5000}, "is neither"),
        ({"layers": "0-3," * 30000 + "0"}, "gives 120001 layers"),
        ({"factor": 0}, "--factor 0: is below 1"),
        ({"factor": -2}, "--factor -2: is below 1"),
        ({"factor": 10**9}, "gives 4000000000 layers"),
        ({"dus": 4}, "--dus 4: is outside 0 to 3"),
        ({"dus": -1}, "--dus -1: is outside 0 to 3"),
        ({}, "needs exactly one of --factor, --dus and --map"),
        ({"factor": 2, "dus": 1}, "needs exactly one"),
        ({"factor": 2, "scale": ["x"]}, "'x' is not a number"),
        ({"factor": 2, "scale": ["inf"]}, "is not finite"),
        ({"factor": 2, "scale": ["nan"]}, "is not finite"),
        ({"factor": 2, "scale": ["9:0.5"]}, "names layer 9, but the model has layers 0 to 7"),
        ({"factor": 2, "scale": ["no_such=0.5"]}, "has 'no_such' in its name"),
    ],
)
def test_senseless_asks_are_refused_in_one_sentence(ask, message, opened):
    with pytest.raises(RecipeError) as refused:
        stack(opened("llama"), **ask)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


MAP = MAPS["abab"]
SCALES = [
    ("0.5", [4, 5, 6, 7], ("o_proj", "down_proj"), 0.5),
    ("2-3:0.3", [2, 3], ("o_proj", "down_proj"), 0.3),
    ("down_proj=1.7", [4, 5, 6, 7], ("down_proj",), 1.7),
    ("0,7:self_attn=-1e-3", [0, 7], ("self_attn",), -1e-3),
]


@pytest.mark.parametrize("case", SCALES, ids=[ask for ask, *_ in SCALES])
def test_scaled_tensors_follow_float64(case, opened, structure, write):
    ask, layers, parts, factor = case
    before = stored(structure("llama_bias"))
    after = stored(write(stack(opened("llama_bias"), factor=2, scale=[ask])))
    for name, got in after.items():
        source = before[source_name(name, MAP)]
        inside = name.startswith("model.layers.") and int(name.split(".")[2]) in layers
        if not (inside and any(part in name for part in parts)):
            assert same_bits(got, source), name
            continue
        wanted = (source.double() * factor).float()
        spacing = torch.nextafter(wanted.abs(), torch.tensor(torch.inf)) - wanted.abs()
        assert ((got - wanted).abs() <= spacing).all(), name


def test_scaling_rounds_once_to_bfloat16(structure, tmp_path):
    from safetensors.torch import save_file

    source = {n: t.bfloat16() for n, t in stored(structure("llama")).items()}
    save_file(source, tmp_path / "in.safetensors")
    base = open_checkpoint(tmp_path / "in.safetensors")
    after = stored(run(stack(base, factor=2, scale=["0.3"]), tmp_path / "out.safetensors").out)
    name = "model.layers.{}.mlp.down_proj.weight"
    wanted = (source[name.format(1)].float() * 0.3).bfloat16()
    assert same_bits(after[name.format(5)], wanted)


def test_a_factor_of_one_is_a_copy(opened):
    plan = stack(opened("llama"), factor=2, scale=["1.0"])
    assert {step.why for step in plan.steps} == {"copy"}


def test_each_source_tensor_is_read_once(opened):
    plan = stack(opened("llama"), factor=4)
    assert plan.bytes_in == opened("llama").nbytes


def test_layers_left_out_of_the_map_are_accounted_for(opened):
    plan = stack(opened("llama"), layers="0,2,2")
    assert len(plan.dropped) == 18
    assert plan.facts["layer_map"] == [0, 2, 2]


def test_the_identity_map_leaves_the_config_as_it_is(opened):
    for name in STRUCTURES:
        base = opened(name)
        assert stack(base, layers="0-3").config == base.config, name
