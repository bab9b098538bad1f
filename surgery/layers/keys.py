"""Names of config entries that say something about layers, and of those that do not (data)."""

import re

# Lists with one entry per layer, whatever comes behind (next-token predictors).
PER_LAYER = {
    "layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type", "attention_layers",
    "moe_layer_freq", "num_key_value_heads_per_layer", "indexer_types", "layer_rope_theta",
    "num_attention_heads_per_layer", "compress_ratios", "block_configs", "sparse_attention_freq",
}  # fmt: skip
# Entries that may be one number for all layers, or a list with one per layer.
MAYBE_PER_LAYER = {
    "attention_window", "activation_sparsity_pattern", "ffn_multipliers", "intermediate_size",
    "moe_intermediate_size", "moe_topk", "num_attention_heads", "num_experts",
    "num_key_value_heads", "num_kv_heads", "num_query_heads", "num_shared_expert",
    "partial_rotary_factors", "qk_rope_head_dim", "rope_theta", "swiglu_limits",
    "swiglu_limits_shared",
}  # fmt: skip
LINEAR_LAYERS = "linear_layers"  # of a linearized model of ours, beside the text's section
# Lists that hold layer numbers.
NUMBERS = {
    LINEAR_LAYERS,
    "mlp_only_layers", "moe_layers", "cross_attention_layers", "attn_layer_indices",
    "full_attn_idxs", "global_attention_layers", "sliding_window_layers", "rope_scaling_layers",
    "local_layer_ids",
}  # fmt: skip
# Lists that may happen to be as long as there are layers, or to hold small numbers, and say
# nothing about layers.
NOT_LAYERS = {
    "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "mrope_section",
    "out_features", "out_indices", "stage_names", "bad_words_ids", "suppress_tokens",
    "begin_suppress_tokens", "forced_decoder_ids", "keys_to_ignore_at_inference", "long_factor",
    "short_factor", "time_step_limit", "mtp_layer_types", "mtp_mlp_layer_types",
    "mtp_layers_block_type", "mtp_local_layer_ids", "cross_attention_pattern", "qkv_multipliers",
    "attention_types", "block_types",
}  # fmt: skip

# Entries that tie layers to their numbers in a way that is not carried over, with the reason.
REFUSED = {
    "num_kv_shared_layers": "its last layers read the keys and values of earlier ones, by number",
    "hidden_size_per_layer_input": "its table of per-layer embeddings has a slice for each layer",
    "kv_source_layers": "its layers read the keys and values of others, by number",
    "ple_layer_ids": "its layer embeddings are numbered by the order of their layers",
    "value_embedding_layers": "its value embeddings are numbered by the order of their layers",
    "num_mem_blocks": "its layers share blocks of weights by number",
    "n_layers_per_attn_res_block": "its layers attend to the outputs of earlier blocks, by number",
}
# What a family takes an entry above to be where its config does not say.
ASSUMED = {("gemma4_text", "hidden_size_per_layer_input"): 256}

# Further names of the number of layers.
COUNTS = ("num_blocks", "num_transformer_layers")

# Rule entries that say nothing where the list that they stand for is given, or the switch is off.
OVERRIDDEN = {
    "sliding_window_pattern": "layer_types",
    "_sliding_window_pattern": "layer_types",
    "prefix_dense_sliding_window_pattern": "layer_types",
    "full_attention_interval": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "layer_group_size": "layer_types",
    "max_window_layers": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "first_k_dense_replace": "mlp_layer_types",
    "dense_mlp_idx": "mlp_layer_types",
    "num_hash_layers": "mlp_layer_types",
    "moe_layer_freq": "mlp_layer_types",
    "moe_layers_enum": "mlp_layer_types",
    "index_topk_freq": "indexer_types",
    "index_topk_pattern": "indexer_types",
    "index_skip_topk_offset": "indexer_types",
    "interleave_moe_layer_step": "moe_layers",
}
SWITCHES = {"max_window_layers": "use_sliding_window"}
# What a number is likely to be that tells layers apart by their own.
SUSPICIOUS = re.compile(
    r"(layer|block|att|moe|expert|window|rope|dense|sparse|global|local|index|mlp|cross|skip)\w*"
    r"(interval|every|freq|period|pattern|step|offset|group_size|start|end|idx|ids?$|indices)"
    r"|first_k|every_n|layers?_(index|at)|skip_layers|window_layers|layers_per|per_layer"
    r"|num_(dense|sparse|global|local|hash|shared|full|linear|first|last|add)\w*_layers"
)
# Names of that kind that say nothing about single layers.
HARMLESS = {
    "global_step", "num_mtp_layers",
    "num_nextn_predict_layers", "per_layer_config", "rope_local_base_freq",
    "scale_attn_by_inverse_layer_idx", "vocab_size_per_layer_input",
}  # fmt: skip
