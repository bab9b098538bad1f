"""Which tokenizer lies beside the weights, told from its files; nothing of it is run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.jsonfile import read_json_object

FILES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("tekken.json", "tiktoken.model", "qwen.tiktoken", "vocab.json", "merges.txt", "vocab.txt"),
    *("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"),
)
KINDS = (
    ("tokenizer.model", "SentencePiece"),
    ("spiece.model", "SentencePiece"),
    ("sentencepiece.bpe.model", "SentencePiece"),
    ("tekken.json", "Tekken"),
    ("tiktoken.model", "tiktoken"),
    ("qwen.tiktoken", "tiktoken"),
    ("merges.txt", "BPE"),
    ("vocab.txt", "WordPiece"),
)
TEMPLATES = ("chat_template.jinja", "chat_template.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """What the tokenizer's files tell.

    Attributes:
        kind: BPE, Unigram, WordPiece, SentencePiece, ...
        tokens: distinct tokens, added ones included; None where only a binary file knows.
        template: the file that holds the chat template, if any does.
    """

    kind: str
    tokens: int | None
    files: tuple[str, ...]
    template: str | None


def find_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """Return what the files beside the weights tell, or None where there is no tokenizer.

    Raises:
        CheckpointError: a file cannot be read or parsed.
    """
    if checkpoint.bare:
        return None
    names = {path.name for path in checkpoint.carried}
    files = tuple(name for name in FILES if name in names)
    if not files:
        return None
    kind, tokens = _vocabulary(checkpoint, names)
    return Tokenizer(kind=kind, tokens=tokens, files=files, template=_template(checkpoint, names))


def _vocabulary(checkpoint: Checkpoint, names: set[str]) -> tuple[str, int | None]:
    if "tokenizer.json" in names:
        return _fast(read_json_object(checkpoint.root / "tokenizer.json"))
    kind = next((kind for name, kind in KINDS if name in names), "unknown")
    if "vocab.json" in names:
        return kind, len(read_json_object(checkpoint.root / "vocab.json"))
    return kind, None


def _fast(document: Mapping[str, Any]) -> tuple[str, int | None]:
    """Read kind and size from the format of the `tokenizers` library."""
    model = document.get("model")
    if not isinstance(model, dict):
        return "unknown", None
    held = model.get("vocab")
    if isinstance(held, dict):
        tokens = set(held)
    elif isinstance(held, list):  # Unigram: pairs of token and score
        tokens = {str(pair[0]) for pair in held if isinstance(pair, list) and pair}
    else:
        return _kind(model), None
    added = document.get("added_tokens")
    extra = [a.get("content") for a in added if isinstance(a, dict)] if added else ()
    return _kind(model), len(tokens | {str(content) for content in extra})


def _kind(model: Mapping[str, Any]) -> str:
    told = model.get("type")
    if isinstance(told, str):
        return told
    return "BPE" if "merges" in model else "unknown"


def _template(checkpoint: Checkpoint, names: set[str]) -> str | None:
    for name in TEMPLATES:
        if name in names:
            return name
    if "tokenizer_config.json" in names:
        told = read_json_object(checkpoint.root / "tokenizer_config.json")
        return "tokenizer_config.json" if told.get("chat_template") else None
    return None
