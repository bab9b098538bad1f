"""A text model's tensors, named as a vision-language model names its own."""

from __future__ import annotations

import pytest

from surgery.checkpoint import open_checkpoint
from surgery.towers import named_like

# Text model, model with further towers, and what some names become.
PAIRS = {
    "llama in llava": (
        "llama",
        "llava",
        {
            "model.layers.3.mlp.up_proj.weight": "language_model.model.layers.3.mlp.up_proj.weight",
            "model.embed_tokens.weight": "language_model.model.embed_tokens.weight",
            "model.norm.weight": "language_model.model.norm.weight",
            "lm_head.weight": "language_model.lm_head.weight",
        },
    ),
    "gemma in gemma with images": (
        "gemma3_text",
        "gemma3",
        {
            "model.layers.0.self_attn.q_norm.weight": (
                "language_model.model.layers.0.self_attn.q_norm.weight"
            ),
            "model.embed_tokens.weight": "language_model.model.embed_tokens.weight",
        },
    ),
}


@pytest.mark.parametrize("case", PAIRS)
def test_names_follow_the_layers_ends_and_norm(structure, case):
    text, whole, names = PAIRS[case]
    source, like = open_checkpoint(structure(text)), open_checkpoint(structure(whole))
    made = named_like(source, like=like)
    assert set(made.tensors) <= set(like.tensors)
    assert len(made.tensors) == len(source.tensors)
    for old, new in names.items():
        assert made.tensors[new].offset == source.tensors[old].offset
        assert made.tensors[new].name == new


@pytest.mark.parametrize("case", PAIRS)
def test_and_back(structure, case):
    text, whole, names = PAIRS[case]
    source, like = open_checkpoint(structure(whole)), open_checkpoint(structure(text))
    made = named_like(source, like=like)
    assert set(names) <= set(made.tensors)
    assert any("vision_tower" in name for name in made.tensors)
    assert len(made.tensors) == len(source.tensors)


def test_names_that_agree_stay(structure):
    source = open_checkpoint(structure("qwen2_vl"))
    assert named_like(source, like=open_checkpoint(structure("qwen2"))) is source
