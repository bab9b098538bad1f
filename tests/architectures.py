"""The configurations of the structure fixtures: one row for each way to lay out tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

VOCAB = 264  # 256 bytes, then the special tokens, then unused rows as real checkpoints have
LAYERS = 4
END, PAD, IMAGE = 256, 257, 258

SLIDING, FULL = "sliding_attention", "full_attention"
_ALTERNATING = [SLIDING, FULL, SLIDING, FULL]
_SPECIAL = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": PAD}


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """One architecture: the config keys that it adds to the shared ones, and how it loads.

    Attributes:
        model_type: transformers' name of the architecture.
        config: keys of the configuration, whole; nothing is added to it.
        auto: the Auto class that loads it.
        decoder: whether it is a causal language model that generates text.
        markers: names on disk that make it what it is.
    """

    model_type: str
    config: Mapping[str, Any]
    auto: str = "AutoModelForCausalLM"
    decoder: bool = True
    markers: tuple[str, ...] = ()


def _gqa(**extra: Any) -> dict[str, Any]:
    """The keys that nearly all decoders since Llama agree on."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        **_SPECIAL,
        "tie_word_embeddings": False,
    } | extra


def _gemma() -> dict[str, Any]:
    return _gqa(
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=8,
        layer_types=_ALTERNATING,
        tie_word_embeddings=True,
    )


_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}

ARCHITECTURES: dict[str, Structure] = {
    "llama": Structure(model_type="llama", config=_gqa()),
    "llama_tied": Structure(model_type="llama", config=_gqa(tie_word_embeddings=True)),
    "llama_bias": Structure(
        model_type="llama",
        config=_gqa(attention_bias=True, mlp_bias=True),
        markers=("model.layers.3.self_attn.o_proj.bias", "model.layers.3.mlp.up_proj.bias"),
    ),
    "mistral": Structure(model_type="mistral", config=_gqa(sliding_window=8)),
    "qwen2": Structure(
        model_type="qwen2",
        config=_gqa(use_sliding_window=True, sliding_window=8, max_window_layers=2),
        markers=("model.layers.0.self_attn.q_proj.bias",),
    ),
    "qwen3": Structure(
        model_type="qwen3",
        config=_gqa(
            head_dim=16,
            tie_word_embeddings=True,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=2,
            layer_types=[FULL, FULL, SLIDING, SLIDING],
        ),
        markers=("model.layers.0.self_attn.q_norm.weight",),
    ),
    "gemma2": Structure(
        model_type="gemma2",
        config=_gemma(),
        markers=("model.layers.0.pre_feedforward_layernorm.weight",),
    ),
    "gemma3_text": Structure(
        model_type="gemma3_text",
        config=_gemma(),
        markers=("model.layers.0.self_attn.q_norm.weight",),
    ),
    "gpt2": Structure(
        model_type="gpt2",
        config={
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_layer": LAYERS,
            "n_head": 4,
            "n_positions": 128,
            **_SPECIAL,
        },
        markers=("transformer.h.3.attn.c_attn.weight",),
    ),
    "gpt_neox": Structure(
        model_type="gpt_neox",
        config=_gqa(use_parallel_residual=True),
        markers=("gpt_neox.layers.3.attention.query_key_value.weight", "embed_out.weight"),
    ),
    "falcon": Structure(
        model_type="falcon",
        config={
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "max_position_embeddings": 128,
            **_SPECIAL,
        },
        markers=("transformer.h.3.self_attention.query_key_value.weight",),
    ),
    "starcoder2": Structure(
        model_type="starcoder2",
        config=_gqa(sliding_window=8, tie_word_embeddings=True),
        markers=("model.layers.3.mlp.c_fc.bias",),
    ),
    "phi3": Structure(
        model_type="phi3",
        config=_gqa(sliding_window=8, original_max_position_embeddings=128),
        markers=(
            "model.layers.3.self_attn.qkv_proj.weight",
            "model.layers.3.mlp.gate_up_proj.weight",
        ),
    ),
    "olmo2": Structure(
        model_type="olmo2",
        config=_gqa(),
        markers=("model.layers.3.post_feedforward_layernorm.weight",),
    ),
    "smollm3": Structure(
        model_type="smollm3",
        config=_gqa(
            no_rope_layers=[1, 1, 0, 1],
            use_sliding_window=True,
            sliding_window=8,
            layer_types=[SLIDING, SLIDING, FULL, SLIDING],
            tie_word_embeddings=True,
        ),
    ),
    "cohere2": Structure(
        model_type="cohere2",
        config=_gqa(
            sliding_window=8,
            layer_types=[SLIDING, SLIDING, SLIDING, FULL],
            tie_word_embeddings=True,
        ),
    ),
    "mixtral": Structure(
        model_type="mixtral",
        config=_gqa(num_local_experts=4, num_experts_per_tok=2),
        markers=(
            "model.layers.3.block_sparse_moe.experts.3.w1.weight",
            "model.layers.3.block_sparse_moe.gate.weight",
        ),
    ),
    "qwen3_moe": Structure(
        model_type="qwen3_moe",
        config=_gqa(
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            mlp_only_layers=[1],
            decoder_sparse_step=1,
        ),
        markers=(
            "model.layers.0.mlp.experts.3.gate_proj.weight",
            "model.layers.1.mlp.gate_proj.weight",
        ),
    ),
    "deepseek_v3": Structure(
        model_type="deepseek_v3",
        config=_gqa(
            num_key_value_heads=4,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            n_shared_experts=1,
            moe_intermediate_size=24,
            first_k_dense_replace=1,
            kv_lora_rank=8,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        ),
        markers=(
            "model.layers.0.mlp.gate_proj.weight",
            "model.layers.1.mlp.experts.3.down_proj.weight",
            "model.layers.1.mlp.gate.e_score_correction_bias",
        ),
    ),
    "gpt_oss": Structure(
        model_type="gpt_oss",
        config=_gqa(
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=131072,
            sliding_window=8,
            layer_types=_ALTERNATING,
        ),
        markers=("model.layers.3.self_attn.sinks", "model.layers.3.mlp.experts.gate_up_proj_bias"),
    ),
    "qwen3_next": Structure(
        model_type="qwen3_next",
        config=_gqa(
            head_dim=16,
            layer_types=["linear_attention", FULL, "linear_attention", FULL],
            linear_conv_kernel_dim=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=24,
        ),
        markers=(
            "model.layers.0.linear_attn.A_log",
            "model.layers.1.self_attn.q_proj.weight",
            "model.layers.0.mlp.experts.3.gate_proj.weight",
        ),
    ),
    "gemma3": Structure(
        model_type="gemma3",
        config={
            "text_config": _gemma(),
            "vision_config": _VISION | {"model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
            "image_token_id": IMAGE,
            "boi_token_index": 259,
            "eoi_token_index": 260,
            **_SPECIAL,
            "tie_word_embeddings": True,
        },
        auto="AutoModelForImageTextToText",
        markers=(
            "language_model.model.layers.3.self_attn.q_norm.weight",
            "vision_tower.encoder.layers.1.mlp.fc1.weight",
        ),
    ),
    "llava": Structure(
        model_type="llava",
        config={
            "text_config": _gqa() | {"model_type": "llama"},
            "vision_config": _VISION | {"model_type": "clip_vision_model", "projection_dim": 16},
            "image_token_id": IMAGE,
            "image_token_index": IMAGE,
            "image_seq_length": 4,
            "tie_word_embeddings": False,
        },
        auto="AutoModelForImageTextToText",
        markers=(
            "language_model.model.layers.3.mlp.up_proj.weight",
            "language_model.lm_head.weight",
        ),
    ),
    "qwen2_vl": Structure(
        model_type="qwen2_vl",
        config={
            "text_config": _gqa(
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [2, 1, 1],
                }
            ),
            "vision_config": {
                "depth": 2,
                "embed_dim": 16,
                "hidden_size": 32,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": 4,
            },
            "image_token_id": IMAGE,
            "video_token_id": 259,
            "vision_start_token_id": 260,
            "vision_end_token_id": 261,
            "tie_word_embeddings": False,
        },
        auto="AutoModelForImageTextToText",
        markers=("model.layers.3.self_attn.q_proj.bias", "visual.blocks.1.attn.qkv.weight"),
    ),
    "bert": Structure(
        model_type="bert",
        config={
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "pad_token_id": PAD,
        },
        auto="AutoModelForMaskedLM",
        decoder=False,
        markers=("bert.encoder.layer.3.attention.self.query.weight",),
    ),
}
