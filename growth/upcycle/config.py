"""The config of a mixture, with all that decides what it computes said outright."""

from collections.abc import Collection
from typing import Any

from growth.upcycle.dense import Dense
from growth.upcycle.layout import Layout

# Keys of the dense families that a mixture has no use for, or that are said in another way.
GONE = (
    *("attention_bias", "mlp_bias", "qkv_bias", "pretraining_tp", "layer_types", "auto_map"),
    *("max_window_layers", "use_sliding_window", "sliding_window", "_name_or_path"),
)
BALANCE = 0.001  # weight of the loss that balances experts: the default of all three classes


def mixture_config(
    dense: Dense, layout: Layout, *, experts: int, top_k: int, sparse: Collection[int]
) -> dict[str, Any]:
    """Return the config of the mixture that a dense model becomes.

    Args:
        sparse: the layers whose feed-forward becomes a mixture.
    """
    config = {key: value for key, value in dense.settings.items() if key not in GONE}
    config |= {
        "architectures": [layout.architecture],
        "model_type": layout.model_type,
        "num_experts_per_tok": top_k,
        "output_router_logits": False,
        "router_aux_loss_coef": BALANCE,
    }
    if layout.name == "mixtral":
        return config | {
            "num_local_experts": experts,
            "router_jitter_noise": 0.0,
            "sliding_window": dense.windows[0],
        }
    layers = range(dense.parts.layers)
    config |= {
        "num_experts": experts,
        "moe_intermediate_size": dense.width,
        "norm_topk_prob": True,  # else the experts' weights do not add up to 1
        "decoder_sparse_step": 1,
        "mlp_only_layers": [n for n in layers if n not in sparse],
    }
    window = next((each for each in dense.windows if each is not None), None)
    config |= {"use_sliding_window": window is not None, "sliding_window": window}
    if layout.name == "qwen3-moe":
        return config | {"attention_bias": "self_attn.o_proj.bias" in dense.names}
    kinds = ["full_attention" if each is None else "sliding_attention" for each in dense.windows]
    return config | {
        "qkv_bias": "self_attn.q_proj.bias" in dense.names,
        "layer_types": kinds,
        "max_window_layers": dense.parts.layers,
        "shared_expert_intermediate_size": 1,
    }
