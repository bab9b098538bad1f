"""Read a tokenizer's vocabulary from its files as JSON; no library of tokenizers is loaded."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.jsonfile import read_json_object, read_small_file
from surgery.errors import CheckpointError
from surgery.vocabulary.alphabet import Alphabet, find_alphabet
from surgery.vocabulary.sentencepiece import read_pieces
from surgery.vocabulary.tables import table_rows

ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Ids of these files' pieces are shifted by the classes that read them.
SHIFTED = ("spiece.model", "sentencepiece.bpe.model", "source.spm")
# What a tokenizer is read from; they are replaced together.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tekken.json", "tiktoken.model", "qwen.tiktoken"),
    *(*SHIFTED, "target.spm", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "tokenizer_config.json", "chat_template.jinja"),
)
TEMPLATE_FOLDER = "additional_chat_templates"
MOST = 1 << 24  # ids; a forged one must not ask for a table of terabytes
REMEDY = "load it with transformers and save it once, which writes a tokenizer.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The tokens of a model and the rows they stand for.

    Attributes:
        ref: the checkpoint, as the user named it.
        kind: BPE, Unigram, WordPiece, WordLevel or SentencePiece.
        ids: token to id, added tokens included.
        added: added token to its flags, in the order of ids.
        roles: `eos_token` and so on to the token that has the role.
        rows: rows of the embedding; more than there are tokens where a model is padded.
        document: the parsed tokenizer.json; None where there is none.
        settings: the parsed tokenizer_config.json.
        files: the tokenizer's files.
    """

    ref: str
    kind: str
    alphabet: Alphabet
    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]
    roles: Mapping[str, str]
    rows: int
    document: Mapping[str, Any] | None
    settings: Mapping[str, Any]
    files: tuple[Path, ...]

    @property
    def end(self) -> int:
        """One more than the largest id."""
        return max(self.ids.values(), default=-1) + 1


def tokenizer_files(checkpoint: Checkpoint) -> tuple[Path, ...]:
    """Return the files of a checkpoint's tokenizer, its chat template included."""
    if checkpoint.bare:
        return ()
    return tuple(
        path
        for path in checkpoint.carried
        if path.name in TOKENIZER_FILES or path.parent.name == TEMPLATE_FOLDER
    )


def read_vocabulary(checkpoint: Checkpoint) -> Vocabulary:
    """Read the vocabulary of a checkpoint from tokenizer.json or what stands in its place.

    Raises:
        CheckpointError: there is no tokenizer, its files are broken, or their ids cannot be told
            without running the tokenizer's own code.
    """
    files = tokenizer_files(checkpoint)
    here = {path.name: path for path in files}
    settings = _object(here, "tokenizer_config.json")
    document = read_json_object(here["tokenizer.json"]) if "tokenizer.json" in here else None
    kind, ids = _told(checkpoint, here, document)
    added = _added(here, document, settings)
    ids.update((content, entry["id"]) for content, entry in added.items())
    if not all(type(number) is int and 0 <= number < MOST for number in ids.values()):
        fact = f"its tokenizer has an id that is no number from 0 to {MOST - 1}"
        raise CheckpointError(checkpoint.root, fact, "restore its files")
    roles = _roles(here, settings)
    _place_unplaced(ids, added, roles)
    ordered = sorted(added, key=ids.__getitem__)
    return Vocabulary(
        ref=checkpoint.ref,
        kind=kind,
        alphabet=find_alphabet(document, kind),
        ids=ids,
        added={content: _flags(added[content]) for content in ordered},
        roles=roles,
        rows=table_rows(checkpoint),
        document=document,
        settings=settings,
        files=files,
    )


def _object(here: Mapping[str, Path], name: str) -> dict[str, Any]:
    return read_json_object(here[name]) if name in here else {}


def _told(
    checkpoint: Checkpoint, here: Mapping[str, Path], document: Mapping[str, Any] | None
) -> tuple[str, dict[str, int]]:
    """Return kind and ids of the model's own vocabulary, without added tokens."""
    if document is not None:
        return _fast(here["tokenizer.json"], document)
    if "vocab.json" in here:
        return "BPE", dict(read_json_object(here["vocab.json"]))
    if "vocab.txt" in here:
        text = read_small_file(here["vocab.txt"]).decode("utf-8", "replace")
        lines = text.rstrip("\n").split("\n")
        return "WordPiece", {token: number for number, token in enumerate(lines)}
    if "tokenizer.model" in here:
        return "SentencePiece", read_pieces(here["tokenizer.model"])
    other = next((name for name in here if name in TOKENIZER_FILES[2:7]), None)
    if other is not None:
        raise CheckpointError(
            here[other], "is a tokenizer whose ids only its own code knows", REMEDY
        )
    fact = "has no tokenizer, so that its rows have no names"
    raise CheckpointError(checkpoint.ref, fact, "put the tokenizer's files beside the weights")


def _fast(path: Path, document: Mapping[str, Any]) -> tuple[str, dict[str, int]]:
    model = document.get("model")
    held = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(model, dict) and isinstance(held, dict):
        return str(model.get("type") or ("BPE" if "merges" in model else "WordLevel")), dict(held)
    if isinstance(held, list) and all(isinstance(pair, list) and pair for pair in held):
        return "Unigram", {str(pair[0]): number for number, pair in enumerate(held)}
    raise CheckpointError(path, "holds no vocabulary (model.vocab)", "restore the file")


def _added(
    here: Mapping[str, Path], document: Mapping[str, Any] | None, settings: Mapping[str, Any]
) -> dict[str, Mapping[str, Any]]:
    """Collect added tokens: those of tokenizer.json win over those of older files."""
    found: dict[str, Mapping[str, Any]] = {
        content: {"id": number, "content": content}
        for content, number in _object(here, "added_tokens.json").items()
    }
    decoder = settings.get("added_tokens_decoder")
    told = decoder.items() if isinstance(decoder, dict) else ()
    entries: list[Any] = [
        {**e, "id": int(number)} for number, e in told if isinstance(e, dict) and number.isdecimal()
    ]
    listed = (document or {}).get("added_tokens") or []
    entries += listed if isinstance(listed, list) else [listed]
    for entry in entries:
        sound = isinstance(entry, dict) and isinstance(entry.get("content"), str)
        if not sound or type(entry.get("id")) is not int:
            place = here.get("tokenizer.json") or here["tokenizer_config.json"]
            raise CheckpointError(place, f"has a broken added token ({str(entry)[:60]})")
        found[entry["content"]] = entry
    return found


def _roles(here: Mapping[str, Path], settings: Mapping[str, Any]) -> dict[str, str]:
    every = {**_object(here, "special_tokens_map.json"), **settings}
    found = {role: _content(every.get(role)) for role in ROLES}
    return {role: token for role, token in found.items() if token is not None}


def _content(value: object) -> str | None:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _place_unplaced(
    ids: dict[str, int], added: dict[str, Mapping[str, Any]], roles: Mapping[str, str]
) -> None:
    """Give ids to special tokens that no file places: transformers appends them on loading."""
    for token in dict.fromkeys(roles.values()):
        if token not in ids:
            number = max(ids.values(), default=-1) + 1
            ids[token] = number
            added[token] = {"id": number, "content": token, "special": True}


def _flags(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {flag: bool(entry.get(flag, False)) for flag in FLAGS}


def same_bytes(first: Iterable[Path], second: Iterable[Path]) -> bool:
    """Whether two sets of files have the same names and bytes."""
    one, two = ({path.name: path for path in files} for files in (first, second))
    return one.keys() == two.keys() and all(
        path.stat().st_size == two[name].stat().st_size
        and path.read_bytes() == two[name].read_bytes()
        for name, path in one.items()
    )


def compact(document: object) -> bytes:
    """Write JSON without line breaks: ten times as fast as with them, and tokenizers are large."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
