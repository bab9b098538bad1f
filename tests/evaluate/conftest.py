"""Tiny random models with byte-level tokenizers, and documents to score."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CONTEXT = 32
WORDS = ["the", "cat", "sat", "on", "a", "mat;", "été", "日本", "was", "here.\n"]


def sentence(seed: int, words: int) -> str:
    """Words drawn by a small linear congruence, so that nothing depends on a library's random."""
    state, chosen = seed, []
    for _ in range(words):
        state = (state * 1103515245 + 12345) % (1 << 31)
        chosen.append(WORDS[(state >> 16) % len(WORDS)])
    return " ".join(chosen)


def byte_tokenizer(*, bos: str | None = "<s>", adds: bool = False, merges: int = 0) -> Any:
    """A byte-level tokenizer: 256 bytes, specials behind them, and a few merges if asked."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<s>", "</s>"])}
    pairs = [("t", "h"), ("th", "e"), ("a", "t"), ("Ġ", "w")][:merges]
    vocabulary |= {"".join(pair): len(vocabulary) + i for i, pair in enumerate(pairs)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    if adds:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token="</s>")


def write_model(out: Path, tokenizer: Any, *, seed: int, **config: Any) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
        "bos_token_id": tokenizer.bos_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**shape | config))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """Build a byte-level tokenizer from keywords: bos, adds, merges."""
    return byte_tokenizer


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a random Llama once per set of arguments, and return its directory."""
    made: dict[str, Path] = {}

    def make(*, seed: int = 0, tokenizer: dict[str, Any] | None = None, **config: Any) -> Path:
        key = json.dumps([seed, tokenizer, config], sort_keys=True)
        if key not in made:
            out = tmp_path_factory.mktemp("model") / f"tiny{seed}"
            made[key] = write_model(out, byte_tokenizer(**tokenizer or {}), seed=seed, **config)
        return made[key]

    return make


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve documents of 1 to 56 words, several longer than the context."""
    out = tmp_path_factory.mktemp("text") / "documents.jsonl"
    lines = [json.dumps({"text": sentence(i + 1, 1 + 5 * i)}) for i in range(12)]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return out
