"""A tiny Llama-shaped checkpoint written by the safetensors crate, and what a run leaves."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from growth.stack import stack
from surgery.checkpoint import open_checkpoint
from surgery.plan import Plan

LAYERS = 2


def tensors(seed: int = 0, *, layers: int = LAYERS) -> dict[str, np.ndarray]:
    """Float16 weights of odd sizes, so that some tensors start off a disk block."""
    rng = np.random.default_rng(seed)

    def some(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float16)

    found = {"model.embed_tokens.weight": some(64, 96), "model.norm.weight": some(96)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        found[at + "self_attn.o_proj.weight"] = some(96, 96)
        found[at + "mlp.down_proj.weight"] = some(96, 33)
        found[at + "input_layernorm.weight"] = some(96)
        found[at + "mlp.down_proj.bias"] = some(3)
    return found


def write(folder: Path, seed: int = 0, *, layers: int = LAYERS) -> Path:
    """Write a HF directory of two shards and return it."""
    folder.mkdir(parents=True)
    every = tensors(seed, layers=layers)
    names = list(every)
    shards = {
        "model-00001-of-00002.safetensors": names[: len(names) // 2],
        "model-00002-of-00002.safetensors": names[len(names) // 2 :],
    }
    for file, inside in shards.items():
        save_file({name: every[name] for name in inside}, folder / file)
    weight_map = {name: file for file, inside in shards.items() for name in inside}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llama", "num_hidden_layers": layers, "vocab_size": 64}
    config |= {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def tree(path: Path) -> dict[str, str]:
    """Digest of every file below a path, by relative name."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def sparse(path: Path, layers: int, megabytes: int) -> Path:
    """A bare file of `layers` zero tensors that takes no disk."""
    size = megabytes << 20
    header = {
        f"model.layers.{i}.w": {
            "dtype": "F16",
            "shape": [size // 2],
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(layers)
    }
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + layers * size)
    return path


def stacked(base: Path) -> Plan:
    """The plan that most tests run: every layer twice."""
    return stack(open_checkpoint(base), factor=2)
