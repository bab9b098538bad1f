"""Every axis of every tensor is named as the architecture's own code slices it."""

from __future__ import annotations

import pytest

from growth.dimensions import Axis, Segment, find_dimensions
from structures import STRUCTURES
from surgery.errors import PlanError

STREAM, INTO = Axis((Segment("hidden", 32),)), Axis((Segment("hidden", 32),), "in")
VOCAB = Axis((Segment("vocab", 264),))
UNKNOWN = {"falcon", "deepseek_v3", "gpt_oss", "qwen3_next", "gemma3", "llava", "qwen2_vl"}
KNOWN = [name for name in STRUCTURES if name not in UNKNOWN]


def one(dimension, units, width=1, side="out"):
    return Axis((Segment(dimension, units, width),), side)


# Structure, tensor, its axes.
AXES = [
    ("llama", "model.embed_tokens.weight", (VOCAB, STREAM)),
    ("llama", "lm_head.weight", (VOCAB, INTO)),
    ("llama", "model.norm.weight", (STREAM,)),
    ("llama", "model.layers.0.self_attn.q_proj.weight", (one("query", 4, 8), INTO)),
    ("llama", "model.layers.0.self_attn.v_proj.weight", (one("key", 2, 8), INTO)),
    ("llama", "model.layers.0.self_attn.o_proj.weight", (STREAM, one("query", 4, 8, "in"))),
    ("llama", "model.layers.1.mlp.down_proj.weight", (STREAM, one("ffn", 48, side="in"))),
    ("llama_bias", "model.layers.0.self_attn.k_proj.bias", (one("key", 2, 8),)),
    ("llama_bias", "model.layers.0.self_attn.o_proj.bias", (STREAM,)),
    ("llama_bias", "model.layers.0.mlp.up_proj.bias", (one("ffn", 48),)),
    ("qwen3", "model.layers.0.self_attn.q_norm.weight", (one("head", 16),)),
    ("olmo2", "model.layers.0.self_attn.q_norm.weight", (one("query", 4, 8),)),
    ("olmo2", "model.layers.0.self_attn.k_norm.weight", (one("key", 2, 8),)),
    (
        "phi3",
        "model.layers.0.self_attn.qkv_proj.weight",
        (Axis((Segment("query", 4, 8), Segment("key", 2, 8), Segment("key", 2, 8))), INTO),
    ),
    (
        "phi3",
        "model.layers.0.mlp.gate_up_proj.weight",
        (Axis((Segment("ffn", 48), Segment("ffn", 48))), INTO),
    ),
    ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.bias", (one("query", 4, 24),)),
    ("gpt_neox", "gpt_neox.layers.0.attention.dense.weight", (STREAM, one("query", 4, 8, "in"))),
    ("gpt_neox", "embed_out.weight", (VOCAB, INTO)),
    ("gpt2", "transformer.wpe.weight", (one("fixed", 128), STREAM)),
    (
        "gpt2",
        "transformer.h.0.attn.c_attn.weight",
        (INTO, Axis((Segment("query", 4, 8), Segment("key", 4, 8), Segment("key", 4, 8)))),
    ),
    ("gpt2", "transformer.h.0.mlp.c_proj.weight", (one("ffn", 128, side="in"), STREAM)),
    ("bert", "bert.embeddings.token_type_embeddings.weight", (one("fixed", 2), STREAM)),
    ("bert", "bert.encoder.layer.0.attention.self.key.weight", (one("key", 4, 8), INTO)),
    (
        "bert",
        "bert.encoder.layer.0.attention.output.dense.weight",
        (STREAM, one("query", 4, 8, "in")),
    ),
    ("bert", "bert.encoder.layer.0.output.dense.weight", (STREAM, one("ffn", 48, side="in"))),
    ("bert", "cls.predictions.bias", (VOCAB,)),
    ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", (one("experts", 4), INTO)),
    (
        "qwen3_moe",
        "model.layers.0.mlp.experts.1.gate_proj.weight",
        (one("expert ffn", 24), INTO),
    ),
    ("qwen3_moe", "model.layers.1.mlp.gate_proj.weight", (one("ffn", 48), INTO)),
]


@pytest.mark.parametrize(("name", "tensor", "axes"), AXES)
def test_axes(name, tensor, axes, opened):
    assert find_dimensions(opened(name)).axes[tensor] == axes


@pytest.mark.parametrize("name", KNOWN)
def test_axes_have_the_sizes_of_the_shape(name, opened):
    base = opened(name)
    axes = find_dimensions(base).axes
    shapes = {tensor: tuple(axis.size for axis in own) for tensor, own in axes.items()}
    assert shapes == {tensor: info.shape for tensor, info in base.tensors.items()}


@pytest.mark.parametrize("name", sorted(UNKNOWN))
def test_a_tensor_that_is_not_known_is_refused(name, opened):
    with pytest.raises(PlanError, match="whose dimensions are not known"):
        find_dimensions(opened(name))


def test_a_norm_of_all_heads_is_known_where_there_is_one_head(tmp_path):
    import transformers

    from surgery.checkpoint import open_checkpoint

    sizes = {"hidden_size": 16, "intermediate_size": 8, "vocab_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model("olmo2", **sizes, **heads)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    axes = find_dimensions(open_checkpoint(tmp_path)).axes
    assert axes["model.layers.0.self_attn.k_norm.weight"] == (one("key", 1, 8),)


def test_rows_of_falcon_are_not_taken_for_those_of_gpt_neox(tmp_path):
    """Each head holds its own query, key and value: sizes that the other order has too."""
    import transformers

    from surgery.checkpoint import open_checkpoint

    sizes = {"hidden_size": 16, "vocab_size": 32, "num_hidden_layers": 1}
    kind = {"multi_query": False, "new_decoder_architecture": False, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model("falcon", **sizes, **kind)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(PlanError, match="query_key_value"):
        find_dimensions(open_checkpoint(tmp_path))
