"""Linearized models of every supported family and method, small and with random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from surgery.checkpoint import open_checkpoint
from surgery.linearize.convert import linearize
from surgery.run import run

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "olmo2")
METHODS = (
    *("lolcats", "hedgehog", "t2r", "liger", "lizard"),
    *("based", "gla", "gated-delta", "swa-sink"),
)
WINDOWED = ("lolcats", "liger", "lizard", "based", "swa-sink")
WINDOW = 6
TOKENS = 23  # longer than the window, and no multiple of anything
# Every method on two families, every family with three methods.
CASES = [(family, method) for family in ("llama", "qwen3") for method in METHODS] + [
    (family, method)
    for family in ("mistral", "qwen2", "gemma3_text", "olmo2")
    for method in ("lolcats", "liger", "gated-delta")
]


def convert(stock: Path, out: Path, method: str, *, keep: str | None = "1", **options: Any) -> Path:
    """Write a linearized directory whose second layer keeps softmax attention."""
    if method in WINDOWED:
        options.setdefault("window", WINDOW)
    if method == "swa-sink":
        options.setdefault("sinks", 2)
    base = open_checkpoint(stock)
    return run(
        linearize(base, method=method, keep_softmax=keep, sliding="convert", **options), out
    ).out


def load(path: Path, *, shake: float = 0.2, **options: Any) -> Any:
    """As a user loads it, in float32; the numbers of the mixers moved from where they start."""
    options.setdefault("dtype", torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, trust_remote_code=True, **options
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mixer." in name:
                parameter.add_(torch.randn_like(parameter) * shake)
    return model.eval()


def prompt(tokens: int = TOKENS, rows: int = 2, seed: int = 0) -> torch.Tensor:
    """Rows of bytes."""
    generator = torch.Generator().manual_seed(seed + tokens)
    return torch.randint(0, 256, (rows, tokens), generator=generator)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Of a whole text at once, without a cache."""
    return model(ids, use_cache=False, **options).logits


@torch.no_grad()
def in_pieces(model: Any, ids: torch.Tensor, pieces: list[int], **options: Any) -> torch.Tensor:
    """Of a text given piece by piece, going on from a cache."""
    found, cache, at = [], None, 0
    mask = options.pop("attention_mask", None)
    for piece in pieces:
        given = {} if mask is None else {"attention_mask": mask[:, : at + piece]}
        output = model(ids[:, at : at + piece], past_key_values=cache, use_cache=True, **given)
        cache, at = output.past_key_values, at + piece
        found.append(output.logits)
    return torch.cat(found, 1)
