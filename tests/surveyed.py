"""Tiny models to inspect, and what inspect tells of them."""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import save_file

from cli.main import main


def told(capsys, *arguments):
    """The JSON that a successful command prints."""
    capsys.readouterr()
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def tensors_of(prefix="model.layers", layers=2, width=4):
    rng = np.random.default_rng(0)
    made = {"model.embed_tokens.weight": rng.random((6, width), np.float32)}
    for n in range(layers):
        made[f"{prefix}.{n}.self_attn.q_proj.weight"] = rng.random((width, width), np.float32)
        made[f"{prefix}.{n}.mlp.up_proj.weight"] = rng.random((2, width), np.float32)
    return made


def make(directory, config=None, tensors=None, **files):
    directory.mkdir(exist_ok=True)
    save_file(tensors or tensors_of(), directory / "model.safetensors")
    plain = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 4, "vocab_size": 6}
    (directory / "config.json").write_text(json.dumps(plain | (config or {})))
    for name, content in files.items():
        path = directory / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return directory
