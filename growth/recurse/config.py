"""What a tied checkpoint says of itself: its configuration, and the modelling file beside it."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

MODELLING_FILE = "modeling_recursive.py"
GUARD = "id2label"
_MOVED = ("model_type", "architectures", "auto_map", "dtype", "torch_dtype", GUARD)
_REMEDY = {"a recursive model: load it with AutoModelForCausalLM and trust_remote_code=True": ""}


def recursive_config(
    stock: Mapping[str, Any],
    *,
    layer_map: Sequence[int],
    per_depth: Sequence[str],
    lora_ranks: Mapping[str, Sequence[int]],
) -> dict[str, Any]:
    """The config.json of a tied checkpoint.

    Every stock class of transformers refuses it. The section `text_config` has no `model_type`
    that one of them could recognise, and the guard, a field whose keys every configuration reads
    as integers, holds a sentence, on both levels because some classes read a section of this name
    unasked.

    Args:
        stock: the flat config of the unrolled model, one entry a depth in its per-layer lists.
        layer_map: for each depth the block that it runs.
        per_depth: names within a layer of the tensors held once a depth.
        lora_ranks: for each linear with low-rank factors their rank at every depth, 0 for none.
    """
    text = {key: value for key, value in stock.items() if key not in _MOVED}
    config = {
        "model_type": "recursive",
        "architectures": ["RecursiveForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_recursive.RecursiveConfig",
            "AutoModelForCausalLM": "modeling_recursive.RecursiveForCausalLM",
        },
        "base_model_type": stock["model_type"],
        "text_config": {**text, GUARD: _REMEDY},
        "layer_map": list(layer_map),
        "per_depth": list(per_depth),
        "lora_ranks": {name: list(ranks) for name, ranks in lora_ranks.items()},
        GUARD: _REMEDY,
    }
    dtype = stock.get("dtype", stock.get("torch_dtype"))
    told = {"dtype": dtype, "tie_word_embeddings": stock.get("tie_word_embeddings")}
    return config | {key: value for key, value in told.items() if value is not None}


def modelling_file() -> bytes:
    """The self-contained file that a tied checkpoint carries as `modeling_recursive.py`."""
    return (files("surgery.models") / MODELLING_FILE).read_bytes()
