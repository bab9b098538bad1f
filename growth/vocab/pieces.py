"""The tokens that a tokenizer cuts a text into, as rows of its model's table."""

from collections.abc import Sequence
from typing import Any

from surgery.errors import CheckpointError
from surgery.vocabulary.alphabet import spell
from surgery.vocabulary.read import REMEDY, Vocabulary, compact


def load_tokenizer(vocabulary: Vocabulary) -> Any:  # noqa: ANN401 - a tokenizers.Tokenizer
    """Return the tokenizer that a tokenizer.json describes; torch is not needed.

    Raises:
        CheckpointError: there is no tokenizer.json, or the library does not take it.
    """
    if vocabulary.document is None:
        fact = f"has a {vocabulary.kind} tokenizer without a tokenizer.json"
        raise CheckpointError(vocabulary.ref, fact, REMEDY)
    return parse_tokenizer(compact(vocabulary.document), vocabulary.ref)


def parse_tokenizer(document: bytes, place: object) -> Any:  # noqa: ANN401 - as above
    """Return the tokenizer of a tokenizer.json's bytes.

    Raises:
        CheckpointError: the library does not take it.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(document.decode())
    except Exception as error:  # the library raises nothing narrower
        fact = f"has a tokenizer.json that cannot be used ({error})"
        raise CheckpointError(place, fact, "restore the file") from error


class Cutter:
    """Cuts text into a vocabulary's tokens, none of which is unknown."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._core = load_tokenizer(vocabulary)
        self._vocabulary = vocabulary
        model = (vocabulary.document or {})["model"]
        self._unknown = {vocabulary.ids.get(str(model.get("unk_token"))), model.get("unk_id")}

    def rows(self, text: bytes) -> Sequence[int]:
        """Return the rows that the text is cut into; none where a part is unknown."""
        found = self._ids(text)
        known = all(row not in self._unknown and row < self._vocabulary.rows for row in found)
        return tuple(found) if known else ()

    def _ids(self, text: bytes) -> list[int]:
        """Return ids. Marked spaces go straight to the model: normalizers put one in front."""
        alphabet = self._vocabulary.alphabet
        if alphabet == "spaces" or (alphabet == "bytes" and not _is_text(text)):
            return [token.id for token in self._core.model.tokenize(spell(text, alphabet))]
        plain = text.decode(errors="replace")
        ids: list[int] = self._core.encode(plain, add_special_tokens=False).ids
        return ids


def _is_text(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
