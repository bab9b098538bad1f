"""Load recursive models as a user's program would."""

from __future__ import annotations

import torch

from structures import example_inputs

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "olmo2")
FULL = 1 << 20  # a rank that every matrix caps


def load_whole(path):
    """The model in float32 with its own code, after making sure that every key found its place."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def logits_of(model, name):
    with torch.no_grad():
        return model(**example_inputs(name)).logits
