"""A tokenizer's files with fewer tokens, under new ids."""

from collections.abc import Mapping
from typing import Any

from growth.vocab.closure import pair
from surgery.errors import PlanError
from surgery.vocabulary.read import Vocabulary, compact

# Files that hold tokens or ids beside tokenizer.json, which takes their place.
OBSOLETE = (
    *("vocab.json", "merges.txt", "vocab.txt", "added_tokens.json", "tokenizer.model"),
    *("spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm", "tekken.json"),
    *("tiktoken.model", "qwen.tiktoken"),
)
LISTS = ("extra_special_tokens", "additional_special_tokens")
SETTINGS, MAP = "tokenizer_config.json", "special_tokens_map.json"
PROCESSORS = ("BertProcessing", "RobertaProcessing", "ByteLevel", "TemplateProcessing", "Sequence")


def renumbered(vocabulary: Vocabulary, new: Mapping[str, int]) -> dict[str, Any]:
    """Return tokenizer.json with the tokens of `new` alone, under its ids.

    Raises:
        PlanError: a part of it holds ids in a way that is not known.
    """
    old = dict(vocabulary.document or {})
    found = {**old, "model": _model(vocabulary, new)}
    found["added_tokens"] = sorted(
        (
            {**entry, "id": new[entry["content"]]}
            for entry in old.get("added_tokens") or ()
            if entry["content"] in new
        ),
        key=lambda entry: int(entry["id"]),
    )
    if old.get("post_processor"):
        found["post_processor"] = _processor(old["post_processor"], vocabulary, new)
    padding = old.get("padding")
    if isinstance(padding, dict) and padding.get("pad_token") in new:
        found["padding"] = {**padding, "pad_id": new[padding["pad_token"]]}
    return found


def _model(vocabulary: Vocabulary, new: Mapping[str, int]) -> dict[str, Any]:
    model = dict((vocabulary.document or {})["model"])
    if vocabulary.kind == "Unigram":
        unknown = model.get("unk_id")
        if unknown is not None:
            model["unk_id"] = new[model["vocab"][unknown][0]]
        model["vocab"] = [entry for entry in model["vocab"] if entry[0] in new]
        return model
    # Added tokens go into the model's vocabulary too: tokenizers gives those that are not in it
    # the ids that follow it, whatever the file says.
    model["vocab"] = dict(new)
    if vocabulary.kind == "BPE":
        prefix = str(model.get("continuing_subword_prefix") or "")
        model["merges"] = [
            merge for merge in model.get("merges") or () if _survives(*pair(merge), prefix, new)
        ]
    return model


def _survives(left: str, right: str, prefix: str, new: Mapping[str, int]) -> bool:
    return left in new and right in new and left + right.removeprefix(prefix) in new


def _processor(
    told: Mapping[str, Any], vocabulary: Vocabulary, new: Mapping[str, int]
) -> dict[str, Any]:
    kind = told.get("type")
    if kind not in PROCESSORS:
        fact = f"has a post-processor {kind!r} in its tokenizer.json, which may hold ids"
        raise PlanError(vocabulary.ref, fact, "its tokens cannot be renumbered")
    found = dict(told)
    if kind == "Sequence":
        found["processors"] = [_processor(one, vocabulary, new) for one in told["processors"]]
    for key in ("sep", "cls"):
        if key in told:
            found[key] = [told[key][0], new[told[key][0]]]
    if kind == "TemplateProcessing":
        found["special_tokens"] = {
            name: {**entry, "ids": [new[token] for token in entry["tokens"]]}
            for name, entry in (told.get("special_tokens") or {}).items()
        }
    return found


def processor_tokens(told: object) -> set[str]:
    """Return the tokens that a post-processor puts around a text."""
    if not isinstance(told, dict):
        return set()
    found = {str(told[key][0]) for key in ("sep", "cls") if key in told}
    for entry in (told.get("special_tokens") or {}).values():
        found.update(entry["tokens"])
    for one in told.get("processors") or ():
        found |= processor_tokens(one)
    return found


def named_tokens(settings: object) -> set[str]:
    """Return the tokens that tokenizer_config.json names, but for those of its lists."""
    if not isinstance(settings, dict):
        return set()
    found: set[str] = set()
    for key, value in settings.items():
        inner = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(inner, str):
            found.add(inner)
        elif key in LISTS and isinstance(value, dict):
            found.update(str(token) for token in value.values())
    return found


def settings_files(files: Mapping[str, Any], new: Mapping[str, int]) -> dict[str, bytes]:
    """Return tokenizer_config.json and special_tokens_map.json for the tokens that are left."""
    return {name: compact(_settings(told, new)) for name, told in files.items() if told}


def _settings(told: Mapping[str, Any], new: Mapping[str, int]) -> dict[str, Any]:
    found = dict(told)
    decoder = told.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        left = {new[e["content"]]: e for e in decoder.values() if e["content"] in new}
        found["added_tokens_decoder"] = {str(n): left[n] for n in sorted(left)}
    for key in LISTS:
        if isinstance(told.get(key), list):
            found[key] = [token for token in told[key] if _content(token) in new]
    return found


def _content(token: object) -> object:
    return token.get("content") if isinstance(token, dict) else token
