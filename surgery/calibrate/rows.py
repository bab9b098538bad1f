"""Rows of tokens of one length each: text without padding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.errors import RecipeError
from surgery.evaluate.documents import Document
from surgery.evaluate.tokens import Mark, encode

if TYPE_CHECKING:
    import numpy.typing as npt
    from transformers import PreTrainedTokenizerBase

    Ids = npt.NDArray[np.int64]

SHORTEST = 2  # tokens of a row
LONGEST = 2048  # unless more are asked for


def row_length(asked: int | None, limit: int | None) -> int:
    """Return the tokens of a row: as asked, by default what the model takes up to `LONGEST`.

    Args:
        limit: the longest input of the model, where it is known.

    Raises:
        RecipeError: the model takes no rows so long.
    """
    if asked is None:
        return min(limit or LONGEST, LONGEST)
    if limit is not None and asked > limit:
        fact = f"{asked} is above the {limit} tokens that the model takes"
        raise RecipeError("--context", fact, "lower it")
    return asked


@dataclass(frozen=True, slots=True)
class TokenRows:
    """What a model is run over.

    Attributes:
        rows: token ids, [tokens] each, of any lengths up to the context.
    """

    rows: tuple["Ids", ...]

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(len(row) for row in self.rows)

    def batches(self, batch_tokens: int) -> Iterator[Any]:
        """Yield [rows, tokens] of rows of equal length, at most `batch_tokens` tokens at once."""
        by_length: dict[int, list[Ids]] = {}
        for row in self.rows:
            by_length.setdefault(len(row), []).append(row)
        for length, rows in by_length.items():
            size = max(batch_tokens // length, 1)
            for start in range(0, len(rows), size):
                yield np.stack(rows[start : start + size])


def plan_token_rows(
    tokenizer: "PreTrainedTokenizerBase",
    documents: Sequence[Document],
    *,
    mark: Mark,
    context: int,
    samples: int,
) -> TokenRows:
    """Cut documents into rows of at most `context` tokens, `samples` of them, evenly picked.

    Raises:
        RecipeError: no document has two tokens.
    """
    found = []
    for encoded in encode(tokenizer, documents, mark=mark):
        ids = encoded.ids
        found += [ids[at : at + context] for at in range(0, len(ids), context)]
    found = [row for row in found if len(row) >= min(SHORTEST, context)]
    if not found:
        raise RecipeError("--text", "holds no text of two tokens", "name a longer text")
    if len(found) > samples:
        found = [found[i * len(found) // samples] for i in range(samples)]
    return TokenRows(tuple(found))
