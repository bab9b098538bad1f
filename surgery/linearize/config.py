"""What a linearized checkpoint says of itself: its config, and the code beside it."""

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.errors import CheckpointError
from surgery.models.own_code import code_files

LINEARIZED = "linearized"  # model_type of what this makes
MODULE = "modeling_linearized"
GUARD = "id2label"
ARCHITECTURES = "base_architectures"  # the key for what it was
_MOVED = ("model_type", "architectures", "auto_map", "dtype", "torch_dtype", GUARD)
_REMEDY = {"a linearized model: load it with AutoModelForCausalLM and trust_remote_code=True": ""}
_SECTIONS = {"text_config": dict, "mixer": dict, "linear_layers": list, "base_model_type": str}


def linearized_config(
    stock: Mapping[str, Any], *, linear_layers: Sequence[int], mixer: Mapping[str, Any]
) -> dict[str, Any]:
    """The config.json of a linearized checkpoint; every stock class of transformers refuses it.

    See `growth.recurse.config.recursive_config`, whose guards are the same.

    Args:
        stock: the flat config of the model with softmax attention.
        linear_layers: numbers of the layers that are converted.
        mixer: what stands for softmax attention there.
    """
    text = {key: value for key, value in stock.items() if key not in _MOVED}
    config = {
        "model_type": LINEARIZED,
        "architectures": ["LinearizedForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_linearized.LinearizedConfig",
            "AutoModelForCausalLM": "modeling_linearized.LinearizedForCausalLM",
        },
        "base_model_type": stock["model_type"],
        "text_config": {**text, GUARD: _REMEDY},
        "linear_layers": list(linear_layers),
        "mixer": dict(mixer),
        GUARD: _REMEDY,
    }
    told = {
        "dtype": stock.get("dtype", stock.get("torch_dtype")),
        "tie_word_embeddings": stock.get("tie_word_embeddings"),
        ARCHITECTURES: stock.get("architectures"),
    }
    return config | {key: value for key, value in told.items() if value is not None}


def is_linearized(base: Checkpoint) -> bool:
    """Whether a checkpoint is one of ours, some of whose layers are linear."""
    return (base.config or {}).get("model_type") == LINEARIZED


def check_config(base: Checkpoint) -> dict[str, Any]:
    """Return the config of a linearized checkpoint.

    Raises:
        CheckpointError: what this writes is not in it.
    """
    config = base.config or {}
    for key, kind in _SECTIONS.items():
        if not isinstance(config.get(key), kind):
            place = base.root / "config.json"
            raise CheckpointError(place, f"has no usable {key}", "restore the config")
    return config


def stock_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the model that a linearized config describes, all of it softmax."""
    text = {name: value for name, value in config["text_config"].items() if name != GUARD}
    back = {"architectures": config[ARCHITECTURES]} if config.get(ARCHITECTURES) else {}
    back["model_type"] = config["base_model_type"]
    told = {name: config[name] for name in ("dtype", "tie_word_embeddings") if name in config}
    return {**back, **text, **back, **told}


def modelling_files() -> dict[str, bytes]:
    """Return the code that a linearized checkpoint carries: the model and all that it imports."""
    return code_files(MODULE)
