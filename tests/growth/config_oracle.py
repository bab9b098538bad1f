"""What transformers makes of a config, and a checkpoint of any depth to try a config on."""

from __future__ import annotations

import importlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import transformers

from surgery.checkpoint import Checkpoint, TensorInfo

MODELS = Path(transformers.__file__).parent / "models"
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Attributes and properties of configuration classes with one value for each layer.
LISTED = (
    "layer_types", "mlp_layer_types", "layers_block_type", "layers_num_experts", "no_rope_layers",
    "attention_layers", "indexer_types", "layer_rope_theta", "num_attention_heads_per_layer",
    "activation_sparsity_pattern", "swiglu_limits",
)  # fmt: skip
# Attributes that hold layer numbers.
NUMBERED = ("moe_layers", "mlp_only_layers", "cross_attention_layers", "full_attn_idxs")
WORDS = re.compile("|".join((*LISTED, *NUMBERED, "block_types", "attn_layer_indices")))


@cache
def classes() -> dict[str, Any]:
    """Every configuration class with layers whose source mentions a per-layer entry, by name."""
    found = {}
    for path in sorted(MODELS.glob("*/configuration_*.py")):
        if not WORDS.search(path.read_text(encoding="utf-8")):
            continue
        module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        for value in vars(module).values():
            mine = isinstance(value, type) and value.__module__ == module.__name__
            if mine and issubclass(value, transformers.PretrainedConfig) and value.model_type:
                found[value.model_type] = value
    return found


def count_key(made: Any) -> str | None:
    return next((key for key in COUNTS if hasattr(made, key)), None)


def read(cls: Any, document: dict[str, Any], folder: Path) -> Any:
    """The config that a class makes of a config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(document))
    return cls.from_pretrained(folder)


def facts(made: Any, layers: int) -> list[tuple[Any, ...]]:
    """What a config in memory says of each layer."""
    told: list[list[Any]] = []
    for name in LISTED:
        value = getattr(made, name, None)
        if isinstance(value, (list, tuple)) and len(value) == layers:
            told.append([name, *value][1:])
    for name in NUMBERED:
        value = getattr(made, name, None)
        if isinstance(value, (list, tuple)):
            told.append([i in value for i in range(layers)])
    overrides = vars(made).get("_heterogeneity_spec")
    if overrides is not None:
        own = overrides.per_layer_overrides
        told.append([own.get(i) for i in range(layers)])
    return list(zip(*told, strict=True)) if told else [()] * layers


def checkpoint(config: dict[str, Any], layers: int, *, extra: int = 0) -> Checkpoint:
    """A checkpoint of layers that are all alike, with no file behind it."""
    path = Path("/nowhere/model.safetensors")
    names = ["model.embed_tokens.weight"]
    names += [f"model.layers.{i}.mlp.weight" for i in range(layers + extra)]
    tensors = {name: TensorInfo(name, "F32", (8, 4), path, 0, 128) for name in names}
    return Checkpoint(
        ref="nowhere", root=path.parent, tensors=tensors, files=(path,), config=config
    )
