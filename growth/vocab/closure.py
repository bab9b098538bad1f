"""Which tokens a tokenizer needs so that it cuts a text as before: pieces, bytes, base letters."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from surgery.errors import PlanError
from surgery.vocabulary.alphabet import BYTE, spell
from surgery.vocabulary.read import Vocabulary

BYTES = 256
KINDS = ("BPE", "Unigram", "WordPiece", "WordLevel")


def check_trimmable(vocabulary: Vocabulary) -> None:
    """Refuse a tokenizer that could not spell what it has lost a token for.

    Raises:
        PlanError: its kind is not known, it has neither bytes nor an unknown token, or it cuts
            at random.
    """
    model = _model(vocabulary)
    if vocabulary.kind not in KINDS:
        fact = f"has a {vocabulary.kind} tokenizer, of which no one knows what a token needs"
        raise PlanError(vocabulary.ref, fact, f"only {', '.join(KINDS)} can be trimmed")
    if model.get("dropout"):
        raise PlanError(vocabulary.ref, "its tokenizer cuts at random (dropout)", "set it to null")
    if not _has_bytes(vocabulary) and _unknown(vocabulary) is None:
        fact = "has a tokenizer without bytes and without an unknown token"
        remedy = "text that needs a token that is gone could not be written: extend it first"
        raise PlanError(vocabulary.ref, fact, remedy)


def base_tokens(vocabulary: Vocabulary) -> set[str]:
    """Return the tokens that any text may need: bytes, letters, the unknown token.

    Of Unigram these are all pieces of one letter, and one of the least score, which says what an
    unknown letter costs; of BPE with bytes, the bytes alone.
    """
    ids, model = vocabulary.ids, _model(vocabulary)
    found = {token for token in ids if BYTE.fullmatch(token)}
    if vocabulary.alphabet == "bytes":
        found |= {letter for letter in spell(bytes(range(BYTES)), "bytes") if letter in ids}
    elif vocabulary.kind != "WordLevel" and not (vocabulary.kind == "BPE" and found):
        prefix = str(model.get("continuing_subword_prefix") or "")
        suffix = str(model.get("end_of_word_suffix") or "")
        found |= {t for t in ids if len(t.removeprefix(prefix).removesuffix(suffix)) == 1}
    if vocabulary.kind == "Unigram":
        found.add(min(model["vocab"], key=lambda pair: float(pair[1]))[0])
    unknown = _unknown(vocabulary)
    return found if unknown is None else {*found, unknown}


def needed(vocabulary: Vocabulary, tokens: Iterable[str]) -> set[str]:
    """Return tokens with those that BPE joins them from, step by step.

    What BPE joins within a token's letters does not depend on what lies around them, as long as
    the token comes out; so the steps of a token by itself are those of every text.
    """
    kept = set(tokens)
    if vocabulary.kind != "BPE":
        return kept
    join = _joiner(vocabulary)
    for token in [token for token in kept if token not in vocabulary.added]:
        kept.update(step for step in join(token) if step in vocabulary.ids)
    return kept


def _joiner(vocabulary: Vocabulary) -> Callable[[str], list[str]]:
    model = _model(vocabulary)
    prefix = str(model.get("continuing_subword_prefix") or "")
    suffix = str(model.get("end_of_word_suffix") or "")
    ranks: dict[tuple[str, str], int] = {}
    for rank, (left, right) in enumerate(map(pair, model.get("merges") or [])):
        ranks.setdefault((left, right), rank)

    def join(token: str) -> list[str]:
        return _join(_letters(token, prefix, suffix), ranks, prefix)

    return join


def pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """Return the two sides of a merge, which is written as a string or as a list."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _letters(token: str, prefix: str, suffix: str) -> list[str]:
    """Return the letters that BPE starts from, with the marks of their place in the word."""
    ends = bool(suffix) and token.endswith(suffix) and token != suffix
    inside = bool(prefix) and token.startswith(prefix) and token != prefix
    plain = token.removesuffix(suffix) if ends else token
    plain = plain.removeprefix(prefix) if inside else plain
    found = [prefix + letter if n or inside else letter for n, letter in enumerate(plain)]
    return [*found[:-1], found[-1] + suffix] if ends else found


def _join(parts: list[str], ranks: Mapping[tuple[str, str], int], prefix: str) -> list[str]:
    """Return all parts that come up while the best pair is joined, the leftmost first."""
    seen = list(parts)
    none = len(ranks)
    while len(parts) > 1:
        found = [ranks.get(both, none) for both in pairwise(parts)]
        best = min(found)
        if best == none:
            break
        at = found.index(best)
        joined = parts[at] + parts[at + 1].removeprefix(prefix)
        parts = [*parts[:at], joined, *parts[at + 2 :]]
        seen.append(joined)
    return seen


def tried(vocabulary: Vocabulary, word: str) -> list[str]:
    """Return the pieces that WordPiece finds, longest first, in a word, before it gives up."""
    prefix = str(_model(vocabulary).get("continuing_subword_prefix") or "")
    found: list[str] = []
    start = 0
    while start < len(word):
        ends = range(len(word), start, -1)
        spellings = ((prefix if start else "") + word[start:end] for end in ends)
        piece = next((spelling for spelling in spellings if spelling in vocabulary.ids), None)
        if piece is None:
            break
        found.append(piece)
        start += len(piece) - (len(prefix) if start else 0)
    return found


def _model(vocabulary: Vocabulary) -> Mapping[str, Any]:
    found: Mapping[str, Any] = (vocabulary.document or {})["model"]
    return found


def _unknown(vocabulary: Vocabulary) -> str | None:
    model = _model(vocabulary)
    number = model.get("unk_id")
    if vocabulary.kind == "Unigram":
        return None if number is None else str(model["vocab"][number][0])
    told = model.get("unk_token")
    return told if told in vocabulary.ids else None


def _has_bytes(vocabulary: Vocabulary) -> bool:
    if vocabulary.alphabet == "bytes":
        return all(letter in vocabulary.ids for letter in spell(bytes(range(BYTES)), "bytes"))
    fallback = _model(vocabulary).get("byte_fallback")
    return bool(fallback) and sum(BYTE.fullmatch(t) is not None for t in vocabulary.ids) == BYTES
