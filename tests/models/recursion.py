"""Tied directories written by hand, and the stock models that they must equal."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from growth.recurse.config import MODELLING_FILE, modelling_file, recursive_config
from structures import build, load

REPO = Path(__file__).resolve().parents[2]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "olmo2")
MAP = (0, 1, 0, 1)
PLAIN: dict[str, tuple[int, ...]] = {}
RELAXED = {"self_attn.q_proj": (0, 3, 5, 2), "mlp.down_proj": (4, 4, 0, 1)}


@dataclass(frozen=True)
class Recursion:
    """A tied directory, and the unrolled model in memory."""

    path: Path
    unrolled: Any
    stored: dict[str, torch.Tensor]


def write(
    family: str,
    out: Path,
    *,
    ranks: dict[str, tuple[int, ...]] = PLAIN,
    layer_map: tuple[int, ...] = MAP,
    own: bool = True,
) -> Recursion:
    """Tie a random model; `own` leaves every depth its one-dimensional parameters."""
    unrolled = load(family, build(family, out / "stock"))[0]
    stored, per_depth = {}, set()
    for name, tensor in unrolled.state_dict().items():
        depth, key = _place(name)
        if depth is None or (own and tensor.ndim == 1):
            stored[name] = tensor
            per_depth |= {key} if depth is not None else set()
            continue
        first = layer_map.index(layer_map[depth])
        if first == depth:
            stored[name] = tensor
        tensor.copy_(stored[f"model.layers.{first}.{key}"])
    if unrolled.config.tie_word_embeddings:
        del stored["lm_head.weight"]
    stored = {name: tensor.clone() for name, tensor in stored.items()}
    stored |= _add_factors(unrolled, ranks)
    stock = json.loads((out / "stock" / "config.json").read_text())
    config = recursive_config(
        stock, layer_map=layer_map, per_depth=sorted(per_depth), lora_ranks=ranks
    )
    _save(out / "tied", config, stored)
    return Recursion(path=out / "tied", unrolled=unrolled, stored=stored)


def tied_parameters(model: Any) -> dict[str, int]:
    """The address of each layer parameter."""
    return {n: p.data_ptr() for n, p in model.model.layers.named_parameters(remove_duplicate=False)}


def prompt(family: str, tokens: int = 12) -> torch.Tensor:
    """Two rows of bytes; the sliding windows of the families hold eight."""
    generator = torch.Generator().manual_seed(len(family) + tokens)
    return torch.randint(0, 256, (2, tokens), generator=generator)


def open_tied(path: Path, **kwargs: Any) -> Any:
    """As a user loads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **kwargs)


def _place(name: str) -> tuple[int | None, str]:
    if not name.startswith("model.layers."):
        return None, name
    _, _, depth, key = name.split(".", 3)
    return int(depth), key


def _add_factors(unrolled: Any, ranks: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator, factors = torch.Generator().manual_seed(7), {}
    for name, of_depth in ranks.items():
        for depth, rank in enumerate(of_depth):
            weight = unrolled.model.layers[depth].get_submodule(name).weight.data
            b = torch.randn(weight.shape[0], rank, generator=generator) * 0.1
            a = torch.randn(rank, weight.shape[1], generator=generator) * 0.1
            weight += b @ a
            if rank:
                factors[f"model.layers.{depth}.{name}.lora_A.weight"] = a
                factors[f"model.layers.{depth}.{name}.lora_B.weight"] = b
    return factors


def _save(path: Path, config: dict[str, Any], stored: dict[str, torch.Tensor]) -> None:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    (path / MODELLING_FILE).write_bytes(modelling_file())
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
