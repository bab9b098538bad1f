"""Every architecture of transformers, and what in its source tells one layer from another.

The tables say what was decided for each. A version of transformers with a new entry, or with new
arithmetic on the number of a layer, fails here until somebody has decided.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from config_oracle import COUNTS, MODELS
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import model_type_to_module_name

from growth.stack import stack
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.errors import PlanError, SurgeryError
from surgery.layers import keys
from surgery.layers.rules import RULES

N = 8
CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
VISION = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
MASKED = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES

# Entries that sound like layers, and say nothing that ties a decoder's layer to its number.
SAY_NOTHING = {
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers",
    "_remove_final_layer_norm", "adapter_layer_norm", "adapter_reuse_layer_norm",
    "block_auto_adjust_ff_dim", "block_ff_dim", "block_ffn_dim_multiplier", "block_multiple_of",
    "block_per_row", "block_size", "do_layer_norm_before", "do_stable_layer_norm",
    "emb_layer_norm_before", "enable_moe_block", "feat_proj_layer_norm", "feature_layer_norm_eps",
    "freeze_text_layers", "freeze_vision_layers", "global_block_size", "index_block_size",
    "index_local_blocks", "index_topk_blocks", "initial_prior_diagonal_n_blocks",
    "initial_prior_first_n_blocks", "layer_norm_elementwise_affine", "layer_norm_eps",
    "layer_norm_epsilon", "layer_scale_init_value", "num_random_blocks", "qk_layer_norms",
    "resblock_dilation_sizes", "resblock_kernel_sizes", "use_repmixer_blocks",
    "use_weighted_layer_sum", "cross_attn_all_layers",
}  # fmt: skip
# Parts that are never the stack that is grown: speech, vision, encoder-decoder.
ELSEWHERE = {
    "cross_attention_frequency", "depth_separable_num_layers", "duration_delta_max_period",
    "num_adapter_layers", "num_mel_attn_blocks", "num_sparse_decoder_layers",
    "num_sparse_encoder_layers", "posterior_encoder_num_wavenet_layers",
    "prior_encoder_num_wavenet_layers", "subsample_layers",
}  # fmt: skip
# Refused as suspicious, or with their family.
REFUSED = {
    "aligner_num_add_layers", "cross_layer_interval", "num_layers_per_stack", "rescale_every",
    "scale_attn_by_inverse_layer_idx",
}  # fmt: skip

RULE, LIST, FAMILY = "a rule of surgery.layers", "a list that moves", "refused with its family"
TOWER, BUILD = "not the language model", "refused, as layers are built differently"
SHARED = "refused by num_kv_shared_layers"
IMAGES = "image layers stay at the start"
# Sources that compute with the number of a layer, and what was decided.
ARITHMETIC = {
    "afmoe": RULE, "axk1": RULE, "beam": FAMILY, "blip_2": TOWER, "cohere_compass": IMAGES,
    "data2vec": TOWER, "deepseek_v2": RULE, "deepseek_v3": RULE, "diffllama": FAMILY,
    "dots1": RULE, "ernie4_5_moe": RULE, "evolla": FAMILY, "exaone4_5": TOWER, "flint": RULE,
    "funnel": BUILD, "gemma3n": FAMILY, "gemma4": SHARED, "gemma4_unified": SHARED,
    "glm4_moe": RULE, "glm4v_moe": RULE, "glm5_next": LIST, "gpt2": "refused by its switch",
    "gpt_neox_japanese": BUILD, "granite4_vision": FAMILY, "granite_docling": IMAGES,
    "inkling2": FAMILY, "instructblip": TOWER, "instructblipvideo": TOWER, "lfm2_moe": RULE,
    "llama4": LIST, "longcat_flash": "numbers its caches, by the number of the layer",
    "minicpm_ocr": TOWER, "minicpmv4_6": TOWER, "minicpmv4_7": TOWER, "minimax": FAMILY,
    "mistral4": RULE, "mllama": LIST, "modernbert": RULE, "modernbert_decoder": RULE,
    "molmo2": LIST, "muse_spark": TOWER, "neomme": FAMILY, "qwen2_5_omni": TOWER,
    "qwen2_5_vl": TOWER, "qwen2_moe": RULE, "qwen3_moe": RULE, "qwen3_next": RULE,
    "qwen3_omni_moe": RULE, "qwen3_vl": IMAGES, "qwen3_vl_moe": IMAGES,
    "qwen4_exp": "refused by ple_layer_ids", "reformer": BUILD, "rwkv": FAMILY, "zaya": RULE,
}  # fmt: skip
NUMBER = r"\b(?:self\.)?(?:decoder_)?layer_(?:idx|id|number|index|num|nr)\b"
COMPUTES = re.compile(
    rf"{NUMBER}\)?\s*(?:%|==|!=|<|>|\*|//?|-|\+|in\b|not in\b)|-\s*(?:self\.)?layer_idx"
    rf"|seed=layer_idx|lambda_init_fn\(layer_idx\)"
)
NOT_ARITHMETIC = re.compile(
    r"past_key|past\.|cache|for layer_\w+ in|in vision_feature_layer|`|^#|^-"
)


def config_entries() -> dict[str, set[str]]:
    """Entries of configurations with layers and a vocabulary, with the classes that have them."""
    found: dict[str, set[str]] = {}
    for path in MODELS.glob("*/configuration_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in (n for n in tree.body if isinstance(n, ast.ClassDef)):
            own = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
            if own & set(COUNTS) and "vocab_size" in own:
                for entry in own | set(_taken(node)):
                    found.setdefault(entry, set()).add(node.name)
    return found


def _taken(node):
    """Names that a class takes out of its keyword arguments."""
    for call in (n for n in ast.walk(node) if isinstance(n, ast.Call) and n.args):
        takes = isinstance(call.func, ast.Attribute) and call.func.attr in ("pop", "get")
        named = takes and getattr(call.func.value, "id", "") == "kwargs"
        if named and isinstance(call.args[0], ast.Constant):
            yield call.args[0].value


def test_every_entry_that_may_be_about_layers_is_decided():
    decided = SAY_NOTHING | ELSEWHERE | REFUSED | keys.PER_LAYER | keys.MAYBE_PER_LAYER
    decided |= keys.NUMBERS | keys.NOT_LAYERS | set(keys.REFUSED)
    decided |= set(keys.OVERRIDDEN) | keys.HARMLESS | set(keys.COUNTS)
    decided |= {key for rule in RULES for key in rule.reads}
    sounds = re.compile(rf"{keys.SUSPICIOUS.pattern}|(^|_)layers?(_|$)|block")
    entries = {key: sorted(names) for key, names in config_entries().items() if sounds.search(key)}
    assert len(entries) > 60
    assert {key: names for key, names in entries.items() if key not in decided} == {}


def test_every_source_that_computes_with_the_number_of_a_layer_is_decided():
    found = {}
    for module in {model_type_to_module_name(name) for name in (*CAUSAL, *VISION, *MASKED)}:
        for path in (MODELS / module).glob("modeling_*.py"):
            lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
            hits = [s for s in lines if COMPUTES.search(s) and not NOT_ARITHMETIC.search(s)]
            if hits:
                found[module] = hits
    assert len(found) > 30
    assert {module: hits for module, hits in found.items() if module not in ARITHMETIC} == {}


def test_entries_that_models_on_the_hub_have_are_not_taken_for_more_than_they_are():
    """Keys of released Gemma 3, Qwen 2.5, Phi-3, Mixtral and DeepSeek configs."""
    ordinary = {
        "rope_local_base_freq": 10000, "sliding_window": 512, "attention_dropout": 0.0,
        "original_max_position_embeddings": 4096, "moe_intermediate_size": 1408,
        "router_aux_loss_coef": 0.02, "num_experts_per_tok": 2, "bos_token_id": 1,
        "routed_scaling_factor": 16.0, "topk_group": 4, "n_group": 8, "ep_size": 1,
        "aux_loss_alpha": 0.001, "max_window_layers": 28, "use_sliding_window": False,
        "moe_layer_freq": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0,
        "pretraining_tp": 1, "attn_logit_softcapping": 50.0, "vision_start_token_id": 151652,
        "image_token_index": 262144, "decoder_start_token_id": 0, "quantization_config": None,
        "mlp_bias": False, "use_cache": True, "transformers_version": "4.50.0.dev0",
        "expert_capacity": 64, "attention_window_size": 2048, "global_step": 1000,
    }  # fmt: skip
    config = {"model_type": "llama", "num_hidden_layers": 3, **ordinary}
    path = Path("/nowhere/model.safetensors")
    names = [f"model.layers.{i}.w" for i in range(3)]
    tensors = {name: TensorInfo(name, "F32", (4,), path, 0, 16) for name in names}
    base = Checkpoint(ref="", root=path.parent, tensors=tensors, files=(path,), config=config)
    assert stack(base, factor=2).config == config | {"num_hidden_layers": 6}


# --- whole models on the meta device: the config builds the layers that the tensors are ---------

LONG = {"odd": [0, 1, 1, 2, 4, 3, 5, 6, 6, 7], "twice": [*range(N), *range(N)]}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 2}
KINDS = ["full_attention", "conv", "conv", "conv"] * 2
MIXED = [
    ("afmoe", {"num_dense_layers": 2}),
    ("bamba", {"attn_layer_indices": [2, 5]}),
    ("deepseek_v2", {"first_k_dense_replace": 2}),
    ("deepseek_v3", {"first_k_dense_replace": 2}),
    ("ernie4_5_moe", {"moe_layer_start_index": 2}),
    ("ernie4_5_moe", {"moe_layer_interval": 2, "moe_layer_start_index": 0}),
    ("glm4_moe", {"first_k_dense_replace": 1}),
    ("jamba", {"attn_layer_period": 4, "attn_layer_offset": 1, "expert_layer_period": 4}),
    ("lfm2", {"layer_types": KINDS}),
    ("llama4_text", {"interleave_moe_layer_step": 2}),
    ("nemotron_h", {"layers_block_type": ["mamba", "moe", "attention", "mlp"] * 2}),
    ("olmo_hybrid", {}),
    ("qwen2_moe", MOE),
    ("qwen3_moe", MOE | {"mlp_only_layers": [3]}),
    ("qwen3_next", MOE),
    ("recurrent_gemma", {}),
]
# The map that the config of these cannot say.
REFUSES = {
    ("afmoe", "twice"), ("deepseek_v2", "twice"), ("deepseek_v3", "twice"),
    ("ernie4_5_moe", "twice"), ("ernie4_5_moe", "odd"), ("glm4_moe", "twice"), ("jamba", "odd"),
}  # fmt: skip


def built(family, document, folder):
    """The tensors, by name and shape, of the model that a config.json describes."""
    (folder / "config.json").write_text(json.dumps(document))
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, CAUSAL.get(family) or VISION[family])
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in cls(config).state_dict().items()}


def as_checkpoint(shapes, document):
    path = Path("/nowhere/model.safetensors")
    tensors = {
        name: TensorInfo(name, "F32", shape, path, 0, 4 * torch.Size(shape).numel())
        for name, shape in shapes.items()
    }
    return Checkpoint(
        ref="nowhere", root=path.parent, tensors=tensors, files=(path,), config=document
    )


def carried(family, document, sources, folder):
    base = as_checkpoint(built(family, document, folder), document)
    plan = stack(base, layers=",".join(map(str, sources)))
    return built(family, plan.config, folder), {n: s.shape for n, s in plan.outputs.items()}


@pytest.mark.parametrize("how", LONG)
@pytest.mark.parametrize(("family", "entries"), MIXED)
def test_layers_of_several_kinds_are_built_as_their_tensors_are(family, entries, how, tmp_path):
    count = {} if "layers_block_type" in entries else {"num_hidden_layers": N}
    document = {"model_type": family, **count, **entries}
    try:
        wanted, got = carried(family, document, LONG[how], tmp_path)
    except PlanError:
        assert (family, how) in REFUSES
        return
    assert got == wanted


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({*CAUSAL, *VISION}))
def test_any_architecture_is_built_as_its_tensors_are_or_refused(family, tmp_path):
    """With default sizes and eight layers, from the shortest config and from one written out."""
    try:
        config = transformers.AutoConfig.for_model(family)
        text = config.get_text_config(decoder=True)
        key = next(key for key in COUNTS if hasattr(text, key))
        section = next((k for k, v in config.to_dict().items() if k == "text_config" and v), None)
        own = {"model_type": text.model_type, key: N}
        short = {"model_type": family, section: own} if section else {"model_type": family, key: N}
        (tmp_path / "config.json").write_text(json.dumps(short))
        transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        built(family, written, tmp_path)
        assert not config.is_encoder_decoder, "an encoder-decoder, refused by its own config"
    except Exception as error:
        pytest.skip(f"does not build so: {str(error)[:80]}")
    for document in (short, written):
        for sources in LONG.values():
            try:
                wanted, got = carried(family, document, sources, tmp_path)
            except SurgeryError:
                continue
            assert {n: s for n, s in got.items() if re.search(r"\.\d+\.", n)} == {
                n: s for n, s in wanted.items() if re.search(r"\.\d+\.", n)
            }
