"""Tiny Llama models whose rows tell token and model, with tokenizers trained on little texts.

Row i of the embedding of the model with `mark` m holds m + i in every column, the head -(m + i).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.plan import Plan, Step, TensorSpec
from surgery.run import run
from surgery.vocabulary import Unified

WIDTH = 8
TEXTS = {
    "fox": "the quick brown fox jumps over the lazy dog, the quick fox. " * 5,
    "sums": "the numbers 123 456 789 are added to the numbers and the sum. " * 5,
    "renard": "le renard brun rapide saute par dessus le chien paresseux. " * 5,
}
MARKS = {"fox": 1000, "sums": 2000, "renard": 4000}
SAMPLES = [
    *TEXTS.values(),
    "Zażółć gęślą jaźń 漢字 🙂\n\ttabs  and   spaces",
    "<|end|>the fox<|end|>",
]


def bpe(text: str, special: Sequence[str], *, size: int = 300) -> Tokenizer:
    """A byte-level BPE tokenizer, as GPT-2's, Llama 3's and Qwen's are."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=letters, special_tokens=[special[0]], show_progress=False
    )
    core.train_from_iterator([text], trainer)
    core.add_special_tokens(list(special[1:]))
    return core


def spaced_bpe(text: str, special: Sequence[str], *, size: int = 80) -> Tokenizer:
    """A BPE tokenizer with a mark for spaces and a fall-back to bytes, as Llama 2's is."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    every = ["<unk>", *special, *(f"<0x{n:02X}>" for n in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=size + len(every), special_tokens=every, show_progress=False
    )
    core.train_from_iterator([text], trainer)
    document = json.loads(core.to_str())  # bytes are no added tokens
    kept = {"<unk>", *special}
    document["added_tokens"] = [a for a in document["added_tokens"] if a["content"] in kept]
    return Tokenizer.from_str(json.dumps(document))


def word_piece(text: str, special: Sequence[str], *, size: int = 120) -> Tokenizer:
    """A WordPiece tokenizer, as BERT's is."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=["[UNK]", *special], show_progress=False
    )
    core.train_from_iterator([text], trainer)
    return core


def word_level(text: str, special: Sequence[str]) -> Tokenizer:
    """One token a word."""
    core = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["[UNK]", *special], show_progress=False)
    core.train_from_iterator([text], trainer)
    return core


def unigram(text: str, special: Sequence[str]) -> Tokenizer:
    """A Unigram tokenizer, as T5's is."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>", *special], unk_token="<unk>", show_progress=False
    )
    core.train_from_iterator([text], trainer)
    return core


def save(
    folder: Path,
    core: Tokenizer | None,
    *,
    mark: int,
    rows: int | None = None,
    padding: int = 0,
    tied: bool = False,
    roles: Mapping[str, str] | None = None,
    template: str | None = None,
    config: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
    more: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write model, tokenizer and configs as a HF directory and return it."""
    folder.mkdir(parents=True)
    ids: dict[str, int] = {}
    if core is not None:
        fast = PreTrainedTokenizerFast(
            tokenizer_object=core, **(roles or {"eos_token": "<|end|>"}), chat_template=template
        )
        fast.save_pretrained(folder)
        rows = rows or len(fast)
        ids = {"eos_token_id": fast.eos_token_id} if fast.eos_token else {}
    count = (rows or 0) + padding
    table = np.repeat((mark + np.arange(count, dtype=np.float32))[:, None], WIDTH, 1)
    tensors = {"model.embed_tokens.weight": table}
    tensors |= {} if tied else {"lm_head.weight": -table}
    tensors |= {name: np.full(shape, mark, np.float32) for name, shape in _layer().items()}
    save_file({**tensors, **(more or {})}, folder / "model.safetensors", {"format": "pt"})
    told = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32",
        "vocab_size": count, "hidden_size": WIDTH, "intermediate_size": WIDTH,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "tie_word_embeddings": tied, "bos_token_id": None, **ids,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**told, **(config or {})}))
    (folder / "generation_config.json").write_text(json.dumps({**ids, **(generation or {})}))
    return folder


def _layer() -> dict[str, tuple[int, ...]]:
    at, square = "model.layers.0.", (WIDTH, WIDTH)
    names = [f"self_attn.{n}_proj" for n in "qkvo"] + [
        f"mlp.{n}_proj" for n in ("gate", "up", "down")
    ]
    norms = [f"{at}input_layernorm", f"{at}post_attention_layernorm", "model.norm"]
    return {f"{at}{n}.weight": square for n in names} | {f"{n}.weight": (WIDTH,) for n in norms}


def speaker(
    folder: Path, name: str, special: Sequence[str] = ("<|end|>",), **options: Any
) -> Checkpoint:
    """One of the models by its text, with a byte-level BPE tokenizer, opened."""
    core = bpe(TEXTS[name], special)
    return open_checkpoint(save(folder / name, core, mark=MARKS[name], **options))


def written(unified: Unified, number: int, out: Path) -> Path:
    """Write one of the unified models as it stands, through the engine; the first is the donor."""
    model = unified.checkpoints[number]
    steps = tuple(
        Step(inputs=(t,), outputs=((name, TensorSpec(t.dtype, t.shape)),))
        for name, t in model.tensors.items()
    )
    lost = [name for other in unified.checkpoints for name in other.tensors]
    plan = Plan(
        operation="unify", parameters={}, sources=unified.checkpoints, steps=steps,
        order=tuple(model.tensors), config=unified.config, carried=unified.carried,
        written=unified.written, dropped=dict.fromkeys(lost, "not this one"),
        facts=unified.facts, notes=unified.notes,
    )  # fmt: skip
    run(plan, out, workers=2)
    return out


def rows(out: Path, name: str = "model.embed_tokens.weight") -> np.ndarray:
    """The first column of a table: what each row tells of itself."""
    table: np.ndarray = load_file(out / "model.safetensors")[name]
    assert table.ndim == 1 or (table == table[:, :1]).all()
    return table if table.ndim == 1 else table[:, 0]
