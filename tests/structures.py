"""Tiny random checkpoints, one per way that a model lays out its tensors, made by transformers.

Each is four layers of width 32, float32 and seeded by its name, with every gain and bias moved off
its initial value so that a layer put in the wrong place changes the logits. What is on disk is what
`save_pretrained` writes: the names a user's files have, not the names of the modules in memory.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from architectures import ARCHITECTURES, LAYERS, VOCAB

__all__ = [
    "LAYERS",
    "STRUCTURES",
    "VOCAB",
    "auto_class",
    "build",
    "example_inputs",
    "is_decoder",
    "load",
    "markers",
]

STRUCTURES: tuple[str, ...] = tuple(ARCHITECTURES)


def auto_class(name: str) -> Any:
    """The transformers Auto class that loads this structure."""
    return getattr(transformers, ARCHITECTURES[name].auto)


def is_decoder(name: str) -> bool:
    """Whether this structure is a causal language model that generates text."""
    return ARCHITECTURES[name].decoder


def markers(name: str) -> tuple[str, ...]:
    """Names on disk that make this structure what it is."""
    return ARCHITECTURES[name].markers


def example_inputs(name: str) -> dict[str, torch.Tensor]:
    """Two rows of twelve byte tokens, longer than the sliding windows; text only."""
    rows = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(_seed(name)))
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}


def build(name: str, out: Path, *, max_shard_size: str = "5GB") -> Path:
    """Write the structure to `out` as a HF directory and return it."""
    structure = ARCHITECTURES[name]
    config = transformers.AutoConfig.for_model(structure.model_type, **structure.config)
    with _seeded(name):
        model = auto_class(name).from_config(config, dtype=torch.float32)
        _randomise(model)
    model.save_pretrained(out, max_shard_size=max_shard_size)
    _tokenizer().save_pretrained(out)
    return out


def load(name: str, path: Path) -> tuple[Any, dict[str, Any]]:
    """The model in float32 and eval mode, and what transformers says of missing and other keys."""
    model, info = auto_class(name).from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    return model.eval(), info


def _seed(name: str) -> int:
    return zlib.crc32(name.encode())


@contextlib.contextmanager
def _seeded(name: str) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(name))
        yield


def _randomise(model: torch.nn.Module) -> None:
    """Initial values are constants for gains and too small for weights to tell layers apart."""
    stored = dict(model.named_parameters()) | {
        key: value for key, value in model.named_buffers() if key in model.state_dict()
    }
    with torch.no_grad():
        for tensor in stored.values():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape)
            tensor.add_(noise, alpha=0.2 if tensor.ndim == 1 else 0.1)


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a byte, no merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=_byte_of)
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
    )


def _byte_of(letter: str) -> int:
    """The byte that GPT-2's printable alphabet writes as this letter."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if ord(letter) in printable:
        return ord(letter)
    hidden = [byte for byte in range(256) if byte not in printable]
    return hidden[ord(letter) - 256]
