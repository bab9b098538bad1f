"""Load factored models as a user's program would, and read what was told of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

FIXTURES = Path(__file__).parents[3] / "fixtures"
TEXT = FIXTURES / "heldout" / "mix.jsonl"
METHODS = ("svd", "monarch", "sparse-low-rank")
FULL = 1 << 20  # a rank that every matrix caps
FAMILIES = ("llama_bias", "mistral", "qwen2", "qwen3", "gemma3_text", "olmo2", "gpt2", "phi3")


def load_whole(path):
    """The model in float32 with its own code, after making sure that every key found its place."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def logits(model):
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(ids).logits


def tensors(path):
    return {k: v for file in Path(path).glob("*.safetensors") for k, v in load_file(file).items()}


def record(path):
    return json.loads((path / "surgery.json").read_text())
