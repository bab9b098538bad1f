"""What a factored checkpoint says of itself: its config, and the modelling file beside it."""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from growth.factor.ask import FACTORED
from growth.factor.form import Form

MODELLING_FILE = "modeling_factored.py"
GUARD = "id2label"
ARCHITECTURES = "base_architectures"  # the key for what it was
_MOVED = ("model_type", "architectures", "auto_map", "dtype", "torch_dtype", GUARD)
_REMEDY = {"a factored model: load it with AutoModelForCausalLM and trust_remote_code=True": ""}


def factored_config(stock: Mapping[str, Any], made: Mapping[str, Form]) -> dict[str, Any]:
    """The config.json of a factored checkpoint; every stock class of transformers refuses it.

    See `growth.recurse.config.recursive_config`, whose guards are the same.

    Args:
        stock: the flat config of the dense model.
        made: the forms of factored maps by module.
    """
    text = {key: value for key, value in stock.items() if key not in _MOVED}
    config = {
        "model_type": FACTORED,
        "architectures": ["FactoredForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_factored.FactoredConfig",
            "AutoModelForCausalLM": "modeling_factored.FactoredForCausalLM",
        },
        "base_model_type": stock["model_type"],
        "text_config": {**text, GUARD: _REMEDY},
        "factored": {name: form.told() for name, form in made.items()},
        GUARD: _REMEDY,
    }
    told = {
        "dtype": stock.get("dtype", stock.get("torch_dtype")),
        "tie_word_embeddings": stock.get("tie_word_embeddings"),
        ARCHITECTURES: stock.get("architectures"),
    }
    return config | {key: value for key, value in told.items() if value is not None}


def stock_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the dense model that a factored config describes."""
    text = {name: value for name, value in config["text_config"].items() if name != GUARD}
    back = {"architectures": config[ARCHITECTURES]} if config.get(ARCHITECTURES) else {}
    back["model_type"] = config["base_model_type"]
    told = {name: config[name] for name in ("dtype",) if name in config}
    return {**back, **text, **back, **told}


def modelling_file() -> bytes:
    """The self-contained file that a factored checkpoint carries as `modeling_factored.py`."""
    return (files("surgery.models") / MODELLING_FILE).read_bytes()
