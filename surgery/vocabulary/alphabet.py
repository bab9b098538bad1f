"""How a vocabulary spells text: GPT-2's letters for bytes, a mark for spaces, or plainly."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

Alphabet = Literal["bytes", "spaces", "plain"]
SPACE = "\u2581"  # SentencePiece's mark
BYTE = re.compile("<0x[0-9A-F]{2}>")  # what a byte without a piece of its own is spelled as
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))


def find_alphabet(document: Mapping[str, Any] | None, kind: str) -> Alphabet:
    """Tell the alphabet from the parts of a tokenizer.json, or from the kind of an older one."""
    if document is None:
        return {"BPE": "bytes", "SentencePiece": "spaces"}.get(kind, "plain")  # type: ignore[return-value]
    parts = list(_walk([document.get(k) for k in ("normalizer", "pre_tokenizer", "decoder")]))
    if any(part.get("type") == "ByteLevel" for part in parts):
        return "bytes"
    marked = any(
        part.get("type") == "Metaspace" or (part.get("type") == "Replace" and _marks(part))
        for part in parts
    )
    return "spaces" if marked else "plain"


def _marks(part: Mapping[str, Any]) -> bool:
    pattern = part.get("pattern")
    told = pattern.get("String") if isinstance(pattern, dict) else None
    return SPACE in (part.get("content"), told)


def _walk(value: object) -> Iterator[Mapping[str, Any]]:
    """Yield every table inside."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            yield one
            left += one.values()
        elif isinstance(one, list):
            left += one


def spelled(
    ids: Mapping[str, int], added: Mapping[str, Any], alphabet: Alphabet
) -> dict[bytes, int]:
    """Return the ids by the bytes of text that each token stands for.

    Where two tokens stand for the same bytes, the one of the lower id is taken, and one that is
    only the fall-back for a byte last of all.
    """
    table = _letters()
    ordered = sorted(ids, key=lambda token: (_is_byte(token), ids[token]))
    found: dict[bytes, int] = {}
    for token in ordered:
        key = token.encode() if token in added else _text(token, alphabet, table)
        found.setdefault(key, ids[token])
    return found


def _is_byte(token: str) -> bool:
    return BYTE.fullmatch(token) is not None


def _letters() -> dict[int, int]:
    """Return the byte for each letter of GPT-2's alphabet.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section
    2.2: printable bytes stand for themselves, the others for the letters from 256 on.
    """
    rest = [byte for byte in range(256) if byte not in PRINTABLE]
    return {256 + n: byte for n, byte in enumerate(rest)} | {byte: byte for byte in PRINTABLE}


def _text(token: str, alphabet: Alphabet, table: Mapping[int, int]) -> bytes:
    if alphabet == "bytes" and all(ord(letter) in table for letter in token):
        return bytes(table[ord(letter)] for letter in token)
    if alphabet == "spaces":
        if _is_byte(token):
            return bytes([int(token[3:5], 16)])
        return token.replace(SPACE, " ").encode()
    return token.encode()


def spell(text: bytes, alphabet: Alphabet) -> str:
    """Spell bytes of text as a vocabulary does; what is no UTF-8 has only letters for bytes."""
    if alphabet == "bytes":
        letters = {byte: chr(letter) for letter, byte in _letters().items()}
        return "".join(map(letters.__getitem__, text))
    plain = text.decode(errors="replace")
    return plain.replace(" ", SPACE) if alphabet == "spaces" else plain
