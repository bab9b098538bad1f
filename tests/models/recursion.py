"""Tied directories written by hand, and the stock models that they must equal."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from growth.recurse.config import MODELLING_FILE, modelling_file, recursive_config
from structures import build, load

REPO = Path(__file__).resolve().parents[2]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "olmo2")
OTHERS = ("mixtral", "qwen3_moe", "smollm3", "cohere2", "gemma2", "phi3", "gpt_oss")
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
    build(family, out / "stock")
    stock = json.loads((out / "stock" / "config.json").read_text())
    unrolled, stored, per_depth = load_file(out / "stock" / "model.safetensors"), {}, set()
    for name, tensor in unrolled.items():
        depth, key = _place(name)
        first = depth if depth is None else layer_map.index(layer_map[depth])
        alone = depth is not None and own and tensor.ndim == 1
        if alone:
            per_depth.add(key)
        if alone or first == depth:
            stored[name] = tensor.clone()
        else:
            unrolled[name] = unrolled[f"model.layers.{first}.{key}"].clone()
    stored |= _add_factors(unrolled, ranks)
    config = recursive_config(
        stock, layer_map=layer_map, per_depth=sorted(per_depth), lora_ranks=ranks
    )
    _save(out / "tied", config, stored)
    (out / "tied" / MODELLING_FILE).write_bytes(modelling_file())
    _save(out / "unrolled", stock, unrolled)
    return Recursion(path=out / "tied", unrolled=load(family, out / "unrolled")[0], stored=stored)


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


def _add_factors(
    unrolled: dict[str, torch.Tensor], ranks: dict[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    generator, factors = torch.Generator().manual_seed(7), {}
    places = [(f"model.layers.{d}.{n}", r) for n, told in ranks.items() for d, r in enumerate(told)]
    for place, rank in places:
        out, into = unrolled[f"{place}.weight"].shape
        b = torch.randn(out, rank, generator=generator) * 0.1
        a = torch.randn(rank, into, generator=generator) * 0.1
        unrolled[f"{place}.weight"] = unrolled[f"{place}.weight"] + b @ a
        if rank:
            factors |= {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b}
    return factors


def _save(path: Path, config: dict[str, Any], stored: dict[str, torch.Tensor]) -> None:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
