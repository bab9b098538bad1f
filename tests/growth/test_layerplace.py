"""What ties a layer to its place: carried along where a config can say it, refused where not."""

from __future__ import annotations

import math

import pytest
from config_oracle import checkpoint

from growth.prune import prune
from growth.stack import stack
from surgery.checkpoint import Checkpoint
from surgery.errors import PlanError

N = 4
TWICE = "0-3,0-3"
LLAMA = {"model_type": "llama", "num_hidden_layers": N}


def carried(config, layers=TWICE, **options):
    return stack(checkpoint(config, N, **options), layers=layers).config


REFUSED = [
    ({"scale_attn_by_inverse_layer_idx": True}, "divides attention by the layer's number"),
    ({"num_kv_shared_layers": 2}, "last layers read the keys and values of earlier ones"),
    ({"hidden_size_per_layer_input": 8}, "a slice for each layer"),
    ({"kv_source_layers": [0, 1, 0, 3]}, "read the keys and values of others"),
    ({"ple_layer_ids": [2]}, "numbered by the order of their layers"),
    ({"n_layers_per_attn_res_block": 2}, "attend to the outputs of earlier blocks"),
    ({"num_mem_blocks": 2}, "share blocks of weights"),
    ({"some_unknown_list": [1, 2, 3, 4]}, "as many as there are layers, and may be about them"),
    ({"nested": {"unknown_list": [1, 2, 3, 4]}}, "as many as there are layers"),
    ({"odd_layer_interval": 2}, "may tell layers apart by their numbers"),
    ({"dense_attention_every_n_layers": 2}, "may tell layers apart"),
    ({"index_topk_freq": 2}, "may tell layers apart"),
    ({"index_topk_pattern": "FSSF"}, "may tell layers apart"),
    ({"num_dense_layers": 1}, "may tell layers apart"),
    ({"sliding_window_pattern": 2}, "may tell layers apart"),
    ({"special_layers": [0, 2]}, "may tell layers apart"),
    ({"max_window_layers": 2, "use_sliding_window": True}, "may tell layers apart"),
    ({"layer_types": ["full_attention"] * 3}, "has 3 entries for 4 layers"),
    ({"hybrid_override_pattern": "M-M"}, "has 3 entries for 4 layers"),
    ({"model_type": "diffllama"}, "lambda depends on the depth"),
    ({"model_type": "rwkv"}, "rescales its hidden states at set depths"),
    ({"indexer_types": ["full", "shared", "full", "shared"]}, "would share the index"),
]


@pytest.mark.parametrize(("entries", "why"), REFUSED)
def test_what_cannot_be_carried_over_is_refused_with_the_reason(entries, why):
    with pytest.raises(PlanError, match=why) as refused:
        carried(LLAMA | entries, "1-3,0-3")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("entries", "why"), REFUSED)
def test_the_identity_needs_nothing_carried_over(entries, why):
    assert carried(LLAMA | entries, "0-3") == LLAMA | entries


@pytest.mark.parametrize(
    "entries",
    [
        {"sliding_window_pattern": None},
        {"sliding_window_pattern": 2, "layer_types": ["full_attention"] * N},
        {"max_window_layers": 2, "use_sliding_window": False},
        {"num_kv_shared_layers": 0},
        {"hidden_size_per_layer_input": None},
        {"scale_attn_by_inverse_layer_idx": False},
        {"eos_token_id": [1, 2, 3, 4]},
        {"rope_scaling": {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4}},
        {"rope_parameters": {"mrope_section": [1, 1, 1, 1]}},
        {"architectures": ["A", "B", "C", "D"]},
        {"tie_word_embeddings": True, "head_dim": 4},
    ],
)
def test_entries_that_say_nothing_of_layers_stay_as_they_are(entries):
    after = carried(LLAMA | entries)
    expected = LLAMA | entries | {"num_hidden_layers": 8}
    if "layer_types" in entries:
        expected["layer_types"] = entries["layer_types"] * 2
    assert after == expected


MOVED = [
    ("layer_types", list("abcd"), list("abcdbd")),
    ("any_layer_list", list("abcd"), list("abcdbd")),
    ("block_configs", [{"n": i} for i in range(4)], [{"n": i} for i in (0, 1, 2, 3, 1, 3)]),
    ("no_rope_layers", [1, 1, 1, 0], [1, 1, 1, 0, 1, 0]),
    ("moe_layer_freq", [0, 1, 1, 1], [0, 1, 1, 1, 1, 1]),
    ("intermediate_size", [1, 2, 3, 4], [1, 2, 3, 4, 2, 4]),
    ("intermediate_size", 48, 48),
    ("moe_topk", [1, 2], [1, 2]),
    ("hybrid_override_pattern", "M-*E", "M-*E-E"),
    ("mlp_only_layers", [1, 2], [1, 2, 4]),
    ("moe_layers", [3], [3, 5]),
    ("cross_attention_layers", [], []),
    ("per_layer_config", {"01": {"a": 1}, "3": {"a": 3}},
     {"1": {"a": 1}, "3": {"a": 3}, "4": {"a": 1}, "5": {"a": 3}}),
    ("kv_source_layers", [0, 1, 2, 3], [0, 1, 2, 3, 4, 5]),
]  # fmt: skip


@pytest.mark.parametrize(("key", "before", "after"), MOVED)
def test_entries_about_layers_move_with_them(key, before, after):
    assert carried(LLAMA | {key: before}, "0-3,1,3")[key] == after


def test_entries_behind_the_layers_are_the_predictors_and_stay_behind():
    config = LLAMA | {"compress_ratios": [0, 4, 128, 4, 0], "num_nextn_predict_layers": 1}
    assert carried(config, "0-3,1,3")["compress_ratios"] == [0, 4, 128, 4, 4, 4, 0]


def test_a_list_in_a_nested_table_moves_too():
    config = LLAMA | {"sparse_attention_config": {"sparse_attention_freq": [0, 1, 1, 0]}}
    after = carried(config, "0-3,1,3")["sparse_attention_config"]
    assert after["sparse_attention_freq"] == [0, 1, 1, 0, 1, 0]


def test_all_names_of_the_number_of_layers_agree():
    config = {"model_type": "xlstm", "num_hidden_layers": N, "num_blocks": N, "num_heads": N}
    after = carried(config)
    assert (after["num_hidden_layers"], after["num_blocks"], after["num_heads"]) == (8, 8, N)


@pytest.mark.parametrize("count", [2, 8])
def test_minicpm_keeps_the_factor_of_each_residual_branch(count):
    config = LLAMA | {"model_type": "minicpm3", "scale_depth": 1.4}
    layers = "0-3,0-3" if count == 8 else "0,2"
    after = carried(config, layers)["scale_depth"]
    assert after / math.sqrt(count) == pytest.approx(1.4 / math.sqrt(N), rel=1e-15)


def test_minicpm_computes_the_same_layers(tmp_path):
    import torch
    import transformers
    from layer_oracle import logits, moved

    from surgery.checkpoint import open_checkpoint
    from surgery.run import run

    torch.manual_seed(0)
    sizes = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": N}
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    tokens = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257, "scale_depth": 1.4}
    config = transformers.MiniCPM3Config(**sizes, **heads, **ranks, **tokens, v_head_dim=8)
    model = transformers.MiniCPM3ForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    out = run(stack(open_checkpoint(tmp_path / "base"), layers="0-3,1-2"), tmp_path / "out").out
    grown = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    expected = moved(model, [0, 1, 2, 3, 1, 2])
    assert (logits(grown) - logits(expected)).abs().max() < 1e-6  # a square root is rounded


@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "num_mtp_layers"])
def test_predictors_keep_their_place_behind_the_layers(key):
    config = {"model_type": "glm4_moe", "num_hidden_layers": N, key: 1}
    config |= {"first_k_dense_replace": 1, "layer_types": list("abcdm"), "mlp_only_layers": [0, 4]}
    plan = stack(checkpoint(config, N, extra=1), layers="0-3,1-3")
    assert plan.config["num_hidden_layers"] == 7
    assert plan.config["layer_types"] == list("abcdbcdm")
    assert plan.config["mlp_only_layers"] == [0, 7]
    last = next(step for step in plan.steps if step.inputs[0].name == "model.layers.4.mlp.weight")
    assert [name for name, _ in last.outputs] == ["model.layers.7.mlp.weight"]
    assert any("predictor" in note for note in plan.notes)


def test_the_tail_may_be_cut_where_attention_depends_on_the_layers_number():
    config = LLAMA | {"scale_attn_by_inverse_layer_idx": True}
    assert carried(config, "0-2")["num_hidden_layers"] == 3
    with pytest.raises(PlanError, match="divides attention"):
        prune(checkpoint(config, N), layers="0")


def test_a_last_layer_that_must_be_full_stays_last():
    kinds = ["sliding_attention", "full_attention"] * 2
    config = {"model_type": "gemma4_unified_text", "num_hidden_layers": N, "layer_types": kinds}
    assert carried(config, "0-3,2-3")["layer_types"] == [*kinds, *kinds[2:]]
    with pytest.raises(PlanError, match="layer 4 would have sliding_attention"):
        carried(config, "0-3,2")


def test_layers_that_image_features_enter_stay_at_the_start():
    text = {"model_type": "qwen3_vl_text", "num_hidden_layers": N}
    vision = {"deepstack_visual_indexes": [1, 2], "depth": 3}
    config = {"model_type": "qwen3_vl", "text_config": text, "vision_config": vision}
    assert carried(config, "0-3,1-3")["text_config"]["num_hidden_layers"] == 7
    with pytest.raises(PlanError, match=r"first 2 layers, which would change; begin the map with"):
        carried(config, "0,0-3")


# Names in a quantisation's tables.
NAMES = [
    ("lm_head", ["lm_head"]),
    ("model.layers.1.mlp", ["model.layers.1.mlp", "model.layers.4.mlp"]),
    ("model.layers.1", ["model.layers.1", "model.layers.4"]),
    ("layers.3.self_attn.q_proj", ["layers.3.self_attn.q_proj", "layers.5.self_attn.q_proj"]),
    ("model.layers.10.mlp", ["model.layers.12.mlp"]),  # beyond the layers: a predictor
    ("vision_tower.layers.1.mlp", ["vision_tower.layers.1.mlp"]),
    ("re:.*lm_head", ["re:.*lm_head"]),
    (r"re:.*layers\.[0-9]+\.mlp", [r"re:.*layers\.[0-9]+\.mlp"]),
    (r"re:.*layers\.\d+\.mlp", [r"re:.*layers\.\d+\.mlp"]),
    ("mlp.gate", ["mlp.gate"]),
]


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignore"])
@pytest.mark.parametrize(("before", "after"), NAMES)
def test_a_quantisations_names_follow_their_layers(before, after, key):
    config = LLAMA | {"quantization_config": {"quant_method": "fp8", key: [before]}}
    assert carried(config, "0-3,1,3")["quantization_config"][key] == after


def test_a_quantisations_tables_follow_their_layers():
    groups = {"group_0": {"targets": ["model.layers.3.mlp"], "weights": {"num_bits": 4}}}
    own = {"model.layers.1.mlp": {"bits": 8}, "lm_head": {"bits": 16}}
    quantisation = {"config_groups": groups, "extra_config": own, "weight_block_size": [128, 128]}
    after = carried(LLAMA | {"quantization_config": quantisation}, "0-3,1")["quantization_config"]
    assert after["config_groups"]["group_0"]["targets"] == ["model.layers.3.mlp"]
    assert after["extra_config"] == {
        "model.layers.1.mlp": {"bits": 8},
        "model.layers.4.mlp": {"bits": 8},
        "lm_head": {"bits": 16},
    }
    assert after["weight_block_size"] == [128, 128]


def test_names_of_dropped_layers_leave_the_quantisation():
    config = LLAMA | {"quantization_config": {"ignore": ["model.layers.1.mlp", "lm_head"]}}
    plan = prune(checkpoint(config, N), layers="1")
    assert plan.config["quantization_config"]["ignore"] == ["lm_head"]


@pytest.mark.parametrize(
    "pattern",
    [r"re:.*layers\.3\.mlp.*", r"re:model\.layers\.(0|1)\..*", "model.layers.3.*",
     r"-:model\.layers\.[12]\..*"],
)  # fmt: skip
def test_patterns_that_number_layers_are_refused(pattern):
    config = LLAMA | {"quantization_config": {"dynamic": {pattern: {}}}}
    with pytest.raises(PlanError, match="which numbers layers"):
        carried(config)


def renamed(base: Checkpoint, old: str, new: str) -> Checkpoint:
    from dataclasses import replace

    tensors = {name.replace(old, new): t for name, t in base.tensors.items()}
    own = {name: replace(tensor, name=name) for name, tensor in tensors.items()}
    return replace(base, tensors=own)


def test_layers_spread_over_several_series_are_refused():
    """XLM keeps attentions.N, ffns.N and layer_norm1.N side by side."""
    from dataclasses import replace

    base = checkpoint({"model_type": "xlm", "n_layers": N}, N)
    other = renamed(base, "model.layers.", "model.ffns.").tensors
    with pytest.raises(PlanError, match="spreads each layer over several series"):
        stack(replace(base, tensors={**base.tensors, **other}), factor=2)


def test_layers_built_differently_must_be_told_apart_by_the_config():
    odd = renamed(checkpoint(LLAMA, N), "layers.2.mlp", "layers.2.experts")
    with pytest.raises(PlanError, match=r"layers 0 and 2 differ .*config does not say why"):
        stack(odd, factor=2)


def test_layers_built_differently_may_be_told_apart_by_any_list():
    config = LLAMA | {"block_configs": ["mlp", "mlp", "experts", "mlp"]}
    odd = renamed(checkpoint(config, N), "layers.2.mlp", "layers.2.experts")
    assert stack(odd, factor=2).config["block_configs"] == config["block_configs"] * 2
