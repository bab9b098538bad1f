"""What each architecture takes its layers to be where its config does not say (data).

Checked against the configuration classes of transformers by tests/growth/test_transformers.py. A
family that is in no table here either has layers that are all alike, or says in its config what
each one is.
"""

from collections.abc import Mapping
from dataclasses import dataclass

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"


@dataclass(frozen=True, slots=True)
class Every:
    """One layer of every `n` is special: the last of the n, or with `first` the first.

    Attributes:
        key: the config entry that gives n; without it, n is part of the architecture.
    """

    n: int
    key: str | None = None
    special: str = FULL
    other: str = SLIDING
    first: bool = False


@dataclass(frozen=True, slots=True)
class Late:
    """Layers from `max_window_layers` on have a sliding window, where windows are in use.

    Attributes:
        start: `max_window_layers` where the config does not say.
        window: `sliding_window` where the config does not say.
        switch: windows are in use only if `use_sliding_window` is on.
        early: it is every other layer before `max_window_layers` instead.
    """

    start: int
    window: int = 4096
    switch: bool = True
    early: bool = False


@dataclass(frozen=True, slots=True)
class DenseFirst:
    """The first `n` layers have a dense feed-forward part, the others experts.

    Attributes:
        key: the config entry that gives n; without it, n is part of the architecture.
        listed: the architecture also reads `mlp_layer_types`, which says it layer by layer.
    """

    n: int
    key: str | None = "first_k_dense_replace"
    listed: bool = True


# What `layer_types` is where it is not given.
LAYER_TYPES: Mapping[str, Every | Late] = {
    "afmoe": Every(4, "global_attn_every_n_layers"),
    "bailing_hybrid": Every(6, "layer_group_size", other=LINEAR),
    "cohere2": Every(4, "sliding_window_pattern"),
    "cwm": Every(4, first=True),
    "dots1": Late(62, switch=False),
    "exaone4": Every(4, "sliding_window_pattern"),
    "exaone_moe": Every(4, "sliding_window_pattern"),
    "gemma2": Every(2),
    "gemma3_text": Every(6, "sliding_window_pattern"),
    "gpt_oss": Every(2),
    "granite_swa": Every(4, first=True),
    "granitemoe_swa": Every(4, first=True),
    "kolibri1": Every(5),
    "modernbert": Every(3, "global_attn_every_n_layers", first=True),
    "modernbert-decoder": Every(3, "global_attn_every_n_layers", first=True),
    "olmo3": Every(4),
    "olmo_hybrid": Every(4, other=LINEAR),
    "qwen2": Late(28),
    "qwen2_5_omni_text": Late(28, window=32768),
    "qwen2_5_vl_text": Late(80),
    "qwen2_moe": Late(28, early=True),
    "qwen2_vl_text": Late(80),
    "qwen3": Late(28),
    "qwen3_5_moe_text": Every(4, "full_attention_interval", other=LINEAR),
    "qwen3_5_text": Every(4, "full_attention_interval", other=LINEAR),
    "qwen3_next": Every(4, "full_attention_interval", other=LINEAR),
    "vaultgemma": Every(2),
}

# Every n-th layer has no rotary embedding where `no_rope_layers` is not given.
NO_ROPE: Mapping[str, int] = {"llama4_text": 4, "mistral_large4_text": 4, "smollm3": 4}

# Which layers have experts where `mlp_layer_types` is not given.
DENSE_FIRST: Mapping[str, DenseFirst] = {
    "afmoe": DenseFirst(1, "num_dense_layers", listed=False),
    "axk1": DenseFirst(1, listed=False),  # its list is newer than the oldest transformers we take
    "axk2": DenseFirst(1),
    "bailing_hybrid": DenseFirst(2),
    "deepseek_v2": DenseFirst(0, listed=False),
    "deepseek_v3": DenseFirst(3, listed=False),
    "deepseek_v32": DenseFirst(3),
    "dots1": DenseFirst(0, listed=False),
    "ernie4_5_vl_moe_text": DenseFirst(1, None),
    "exaone_moe": DenseFirst(1),
    "glm4_moe": DenseFirst(1, listed=False),
    "glm4_moe_lite": DenseFirst(1, None),
    "glm4v_moe_text": DenseFirst(1, listed=False),
    "glm5_next_text": DenseFirst(3, None),
    "glm_moe_dsa": DenseFirst(3),
    "hy_v3": DenseFirst(1, None),
    "hy_v4": DenseFirst(1, None),
    "kimi_linear": DenseFirst(1),
    "laguna": DenseFirst(1, None),
    "lfm2_moe": DenseFirst(2, "num_dense_layers", listed=False),
    "mimo_v2_flash": DenseFirst(1, None),
    "mistral4": DenseFirst(0, listed=False),
    "mistral_large4_text": DenseFirst(1),
    "unlimited_ocr_text": DenseFirst(1),
}

# Period and offset of Jamba's layers where the config does not say.
PERIODS: Mapping[str, Mapping[str, tuple[int, int]]] = {"jamba": {"attn": (8, 4), "expert": (2, 1)}}

# Lists that an architecture makes up by a rule of its own that is not in the tables above.
UNLISTED: Mapping[str, tuple[str, ...]] = {
    "cohere2_moe": ("layer_types", "mlp_layer_types"),
    "deepseek_v4": ("layer_types", "mlp_layer_types"),
    "diffusion_gemma_text": ("layer_types",),
    "dots3_note_text": ("layer_types", "mlp_layer_types"),
    "flint": ("layer_types", "mlp_only_layers"),
    "gemma4_text": ("layer_types",),
    "gemma4_unified_text": ("layer_types",),
    "glm5_next_text": ("layer_types",),
    "hy_v4": ("indexer_types",),
    "inkling_text": ("layer_types", "mlp_layer_types"),
    "kimi_linear": ("layer_types",),
    "lfm3": ("layer_types",),
    "mimo_v2_flash": ("layer_types",),
    "minimax_m3_vl_text": ("layer_types", "mlp_layer_types"),
    "mllama_text_model": ("cross_attention_layers",),
    "muse_glimmer_text": ("layer_types", "layer_rope_theta"),
    "muse_spark_text": ("layer_types", "layer_rope_theta"),
    "nemotron_h": ("layers_block_type",),
    "qwen4_exp_text": ("layer_types",),
    "step3p5": ("layer_types", "mlp_layer_types"),
    "t5_gemma_module": ("layer_types",),
    "t5gemma2_decoder": ("layer_types",),
    "t5gemma2_text": ("layer_types",),
    "ultrabert": ("layer_types",),
}
# Entries that stand in for a list above.
STAND_INS: Mapping[str, str] = {
    "compress_ratios": "layer_types",
    "hybrid_override_pattern": "layers_block_type",
    "layer_types": "layers_block_type",
}

# Families whose last layer has full attention, whatever the config says.
LAST_IS_FULL = {
    "diffusion_gemma_text", "embedding_gemma2_text", "gemma4_text", "gemma4_unified_text",
}  # fmt: skip

# Families whose first layer is built or computes differently.
FIRST_IS_OWN: Mapping[str, str] = {
    "modernbert": "has no norm before its attention",
    "modernbert-decoder": "has no norm before its attention",
    "zaya": "has no router state to take over",
}

# Architectures whose arithmetic ties a layer to its place in a way that no config can undo.
DEPTH_MATHS: Mapping[str, str] = {
    "beam": "each layer adds a residual by its own number",
    "big_bird": "its random attention is seeded by the number of the layer",
    "blt": "several stacks feed one another at set layers",
    "diffllama": "its attention's lambda depends on the depth of the layer",
    "embedding_gemma2_text": "its table of per-layer embeddings has a slice for each layer",
    "evolla": "its adapters sit at places that depend on the number of layers",
    "gemma3n_text": "its last layers read the keys and values of earlier ones, by number",
    "granite4_vision_text": "image features enter at set layers",
    "hrm_text": "its layers run in cycles, and their caches are laid out by number",
    "inkling2_text": "its layers attend to the outputs of earlier blocks, by number",
    "minimax": "its linear attention decays by the depth of the layer",
    "minimax_text_01": "its linear attention decays by the depth of the layer",
    "neomme": "its residual factor and value embeddings depend on the depth of the layer",
    "rwkv": "it rescales its hidden states at set depths",
    "zamba": "its layers share blocks of weights by number",
    "zamba2": "its layers share blocks of weights by number",
}


def family_of(config: Mapping[str, object]) -> str:
    """Return the family under which the tables know the model that a (text) config describes."""
    name = str(config.get("model_type"))
    known = (LAYER_TYPES, NO_ROPE, DENSE_FIRST, UNLISTED, DEPTH_MATHS, FIRST_IS_OWN)
    return next((f for f in (name, f"{name}_text") if any(f in table for table in known)), name)
