"""Documents as token ids, with an honest count of the bytes that are scored.

A tokenizer that has a beginning-of-sequence mark gets it in front of every document, so that the
first token has something to be predicted from. Where the tokenizer puts the mark there itself,
the model knows no sequence without it, and every later window of the document gets it too; else
it only opens the document. Without such a mark the first token is not scored, and neither are its
bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from surgery.errors import TrainError
from surgery.evaluate.documents import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One document for one tokenizer.

    Attributes:
        ids: Token ids, the mark included; shape [tokens].
        given: How many leading tokens are context only.
        sink: Whether every window begins with the first token, the mark.
        size: UTF-8 bytes of the raw text that the scored tokens stand for.
        unknown: Scored tokens that say only "something unknown": their bytes come free.
    """

    ids: npt.NDArray[np.int64]
    given: int
    sink: bool
    size: int
    unknown: int


@dataclass(frozen=True, slots=True)
class Mark:
    """The beginning-of-sequence mark: its id, and whether every window begins with it."""

    token: int | None
    every_window: bool

    @property
    def kind(self) -> str:
        """Say where the mark stands: "window", "document" or "none"."""
        return "none" if self.token is None else "window" if self.every_window else "document"


def find_mark(tokenizer: "PreTrainedTokenizerBase") -> Mark:
    """Return the tokenizer's mark, and whether the tokenizer adds it by its own rule."""
    token = tokenizer.bos_token_id
    if token is None:
        return Mark(None, every_window=False)
    ids = tokenizer("a")["input_ids"]
    return Mark(int(token), every_window=bool(ids) and ids[0] == token)


def encode(
    tokenizer: "PreTrainedTokenizerBase", documents: Sequence[Document], *, mark: Mark
) -> list[Encoded]:
    """Tokenize documents as raw text.

    Raises:
        TrainError: The tokenizer has no mark and cannot tell the bytes of its first token.
    """
    if mark.token is None and not tokenizer.is_fast:
        raise TrainError(
            tokenizer.name_or_path,
            "the tokenizer has no beginning-of-sequence token and gives no offsets",
            "add its tokenizer.json",
        )
    return [_encode(tokenizer, document.text, mark=mark) for document in documents]


def difference_between(
    parent: "PreTrainedTokenizerBase",
    child: "PreTrainedTokenizerBase",
    pairs: Sequence[tuple[Encoded, Encoded]],
) -> str | None:
    """Say why tokens of two tokenizers cannot be compared one by one, or None if they can."""
    vocabulary, other = parent.get_vocab(), child.get_vocab()
    if len(vocabulary) != len(other):
        return f"the tokenizers differ: {len(other)} tokens against the parent's {len(vocabulary)}"
    if vocabulary != other:
        return "the tokenizers differ: the same number of tokens under other names or ids"
    for mine, yours in pairs:
        if mine.given != yours.given or not np.array_equal(mine.ids, yours.ids):
            return "the tokenizers differ: one text gives other tokens"
    return None


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str, *, mark: Mark) -> Encoded:
    marked = mark.token is not None
    encoding = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=not marked, verbose=False
    )
    ids = np.asarray([mark.token] * marked + encoding["input_ids"], dtype=np.int64)
    given, start = (1, 0) if marked else _first_scored(encoding["offset_mapping"], len(text))
    unknown = tokenizer.unk_token_id
    lost = 0 if unknown is None or unknown == mark.token else int((ids[given:] == unknown).sum())
    size = len(text[start:].encode())
    return Encoded(ids=ids, given=given, sink=mark.every_window, size=size, unknown=lost)


def _first_scored(offsets: Sequence[tuple[int, int]], length: int) -> tuple[int, int]:
    """Return the first scored token and the character at which its bytes begin.

    Tokens may share a character when they hold single bytes of it; all that touch what the first
    token touches stay unscored, so that no byte is counted in part.
    """
    reach = offsets[0][1] if offsets else length
    for token, (start, end) in enumerate(offsets[1:], start=1):
        if start >= reach:
            return token, start
        reach = max(reach, end)
    return max(1, len(offsets)), length
