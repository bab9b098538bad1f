"""Windows of many documents as batches of padded rows: integers only, no model.

Axis letters: b rows of a batch, t tokens of a row, n scored tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from surgery.evaluate.tokens import Encoded
from surgery.evaluate.windows import Window, plan_windows

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Row:
    """One window of the document with that number."""

    document: int
    window: Window


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows padded on the right, and where each scored token's logits are found.

    Attributes:
        rows: The windows, widest first.
        ids_bt: Token ids; the padding holds zeros.
        mask_bt: 1 for tokens, 0 for padding; None where nothing is padded.
        row_n: The row of each scored token.
        position_n: The position in that row whose logits predict it.
        target_n: The token itself.
    """

    rows: tuple[Row, ...]
    ids_bt: Ints
    mask_bt: Ints | None
    row_n: Ints
    position_n: Ints
    target_n: Ints


def plan_rows(
    encoded: Sequence[Encoded], *, context: int, stride: int, batch_tokens: int
) -> list[tuple[Row, ...]]:
    """Return the windows of all documents in batches of near-equal width, widest first.

    A batch is at most `batch_tokens` wide times rows, padding included, but holds one row at
    least.
    """
    rows = [
        Row(number, window)
        for number, e in enumerate(encoded)
        for window in plan_windows(
            len(e.ids), context=context, stride=stride, given=e.given, sink=e.sink
        )
    ]
    rows.sort(key=lambda row: (-row.window.width, row.window.score_from - row.window.end))
    return list(_cut(rows, batch_tokens))


def fill(rows: tuple[Row, ...], encoded: Sequence[Encoded]) -> Batch:
    """Lay the tokens of the rows out as one rectangle."""
    widths = np.array([row.window.width for row in rows])
    ids = np.zeros((len(rows), widths.max()), dtype=np.int64)
    for line, row in zip(ids, rows, strict=True):
        _fill_row(line, row.window, encoded[row.document].ids)
    mask = None if (widths == widths[0]).all() else _mask(widths)
    scored = [range(row.window.score_from, row.window.end) for row in rows]
    return Batch(
        rows=rows,
        ids_bt=ids,
        mask_bt=mask,
        row_n=np.repeat(np.arange(len(rows)), [len(s) for s in scored]),
        position_n=np.concatenate(
            [np.arange(r.window.position(s[0]), r.window.width) for r, s in _paired(rows, scored)]
        ),
        target_n=np.concatenate(
            [encoded[r.document].ids[s.start : s.stop] for r, s in _paired(rows, scored)]
        ),
    )


def _cut(rows: Sequence[Row], batch_tokens: int) -> Iterator[tuple[Row, ...]]:
    start = 0
    while start < len(rows):
        count = max(1, batch_tokens // rows[start].window.width)
        yield tuple(rows[start : start + count])
        start += count


def _fill_row(line: Ints, window: Window, ids: Ints) -> None:
    if window.sink:
        line[0] = ids[0]
    line[int(window.sink) : window.width] = ids[window.begin : window.end - 1]


def _mask(widths: Ints) -> Ints:
    mask: Ints = (np.arange(widths.max()) < widths[:, None]).astype(np.int64)
    return mask


def _paired(rows: Sequence[Row], scored: Sequence[range]) -> Iterator[tuple[Row, range]]:
    return zip(rows, scored, strict=True)
