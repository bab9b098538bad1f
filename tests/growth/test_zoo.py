"""Every causal architecture of transformers that can be built small: exact, or refused.

Not chosen by hand: what a new version of transformers adds is tried as well.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from config_oracle import COUNTS
from layer_oracle import logits, moved
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

from growth.expand import expand
from growth.stack import stack
from surgery.checkpoint import open_checkpoint
from surgery.errors import SurgeryError
from surgery.run import run

N = 6
MAPS = ([0, 1, 2, 1, 2, 3, 4, 5], [0, 1, 1, 2, 4, 3, 5], [*range(N), *range(N)])
MOST = 5_000_000  # parameters
_SIZES = {
    264: "vocab_size",
    128: "max_position_embeddings n_positions n_ctx max_seq_len",
    64: "mamba_d_ssm index_topk",
    48: "intermediate_size ffn_dim n_inner ffn_hidden_size d_ff dense_intermediate_size "
        "intermediate_size_mlp",
    32: "hidden_size n_embd d_model word_embed_proj_dim n_embed embedding_size lru_width dim",
    24: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size",
    16: "q_lora_rank chunk_size mamba_chunk_size",
    8: "head_dim sliding_window kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim "
       "state_size mamba_d_state mamba_n_heads mamba_d_head linear_key_head_dim rotary_dim "
       "linear_value_head_dim attention_window_size mamba_num_heads mamba_head_dim d_kv "
       "index_head_dim attention_chunk_size swa_head_dim swa_v_head_dim query_pre_attn_scalar",
    4: "num_attention_heads n_head n_heads num_experts num_local_experts n_routed_experts "
       "moe_num_experts linear_num_value_heads num_heads conv_kernel time_step_rank",
    2: "num_key_value_heads num_kv_heads num_experts_per_tok moe_topk moe_k moe_top_k "
       "linear_num_key_heads index_n_heads",
    1: "n_group topk_group mamba_n_groups o_groups n_groups",
    257: "pad_token_id",
    256: "bos_token_id eos_token_id decoder_start_token_id",
}  # fmt: skip
SIZES = {name: size for size, names in _SIZES.items() for name in names.split()}
LATENT = {"head_dim": 8, "qk_head_dim": 16, "num_key_value_heads": 4}
OWN = dict.fromkeys(
    ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa",
     "minicpm3", "youtu"),
    LATENT,
) | {
    "gpt_neo": {"attention_types": [[["global", "local"], 3]], "window_size": 8},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"] * 3, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "roberta": {"pad_token_id": 1},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def small(family, folder):
    """A random model, saved and loaded again, or None where these sizes do not fit it."""
    try:
        default = transformers.AutoConfig.for_model(family)
        if default.is_encoder_decoder or "text_config" in default.to_dict():
            return None
        entries = {key: SIZES[key] for key, v in default.to_dict().items() if _sized(key, v)}
        count = next(key for key in COUNTS if hasattr(default, key))
        config = type(default)(**entries | {count: N} | OWN.get(family, {}))
        with torch.device("meta"):
            size = sum(p.numel() for p in _new(config).parameters())
        if size > MOST:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = _new(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn(parameter.shape), alpha=0.1)
        model.save_pretrained(folder)
        loaded = _load(folder)
        return loaded if logits(loaded).isfinite().all() else None
    except Exception:
        return None


def _sized(key, value):
    return key in SIZES and type(value) is int


def _new(config):
    return transformers.AutoModelForCausalLM.from_config(config)


def _load(path):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    for parameter in model.parameters():  # tensors of odd sizes lie unaligned in a mapped file,
        parameter.data = parameter.data.clone()  # and another kernel rounds otherwise
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(CAUSAL))
def test_growth_is_exact_or_refused(family, tmp_path):
    model = small(family, tmp_path / "base")
    if model is None:
        pytest.skip("not built by these sizes")
    base = open_checkpoint(tmp_path / "base")
    done = []
    for number, sources in enumerate(MAPS):
        try:
            plan = stack(base, layers=",".join(map(str, sources)))
        except SurgeryError:
            continue
        grown = _load(run(plan, tmp_path / f"stack{number}").out)
        assert torch.equal(logits(grown), logits(moved(model, sources))), sources
        done.append(sources)
    for blocks in (2, 4, 6):
        try:
            plan = expand(base, blocks=blocks)
        except SurgeryError:
            continue
        grown = _load(run(plan, tmp_path / f"expand{blocks}").out)
        assert (logits(grown) - logits(model)).abs().max() == 0.0, blocks
        done.append(blocks)
    if not done:
        pytest.skip("refused")
