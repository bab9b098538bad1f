"""From which model's which row each row of a new table comes."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.vocabulary.alphabet import spelled
from surgery.vocabulary.read import Vocabulary

AVERAGE, ZERO, MEAN = -1, -2, -3  # of those that have the token; nothing; of all own rows
Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowMap:
    """Where the rows of one model's new table come from.

    Attributes:
        number: the model's own place among the models.
        pick: [rows] the model to take from, or AVERAGE, ZERO, MEAN.
        row: [rows] the row to take there.
        own: [models, rows] the row of each model that stands for the same token, or -1; averages
            are over these. Shared by the maps of all models.
    """

    number: int
    pick: Numbers
    row: Numbers
    own: Numbers

    @property
    def size(self) -> int:
        """Rows of the new table."""
        return len(self.pick)

    def is_identity(self, rows: int) -> bool:
        """Whether a table of `rows` rows stays as it is."""
        mine = self.size == rows and bool((self.pick == self.number).all())
        return mine and bool((self.row == np.arange(rows)).all())

    def models(self) -> list[int]:
        """Return the models that rows are taken from, the own one first."""
        found = {self.number: None} | dict.fromkeys(np.unique(self.pick[self.pick >= 0]).tolist())
        if (self.pick == AVERAGE).any():
            averaged = (self.own[:, self.pick == AVERAGE] >= 0).any(axis=1)
            found |= dict.fromkeys(np.flatnonzero(averaged).tolist())
        return list(found)

    def digest(self) -> str:
        """Return what tells two maps apart."""
        shared = self.own[:, self.pick == AVERAGE]
        parts = (self.pick, self.row, shared)
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()

    def counts(self) -> dict[str, int]:
        """Return how many rows are the model's own, another's, averages, means and zeros."""
        return {
            "own": int((self.pick == self.number).sum()),
            "another model's": int(((self.pick >= 0) & (self.pick != self.number)).sum()),
            "average": int((self.pick == AVERAGE).sum()),
            "mean of all rows": int((self.pick == MEAN).sum()),
            "zero": int((self.pick == ZERO).sum()),
        }


def own_rows(
    models: Sequence[Vocabulary], donor: Vocabulary, ids: Mapping[str, int], size: int
) -> Numbers:
    """Return [models, size]: the row of each model that stands for each new id, or -1.

    A row without a name in both the new vocabulary and the model's stands for itself: what pads
    a table is kept. Tokens are compared as text where vocabularies spell it differently.
    """
    found = np.full((len(models), size), -1, np.int64)
    places = np.fromiter(ids.values(), np.int64, len(ids))
    mixed = len({model.alphabet for model in models}) > 1
    for number, model in enumerate(models):
        keys: Iterable[Any] = ids.keys()
        theirs: Mapping[Any, int] = model.ids
        if mixed and model.alphabet != donor.alphabet:
            theirs = {**spelled(model.ids, model.added, model.alphabet)}
            keys = _spellings(ids, donor)
        rows = np.fromiter(map(theirs.get, keys, repeat(-1)), np.int64, len(ids))
        rows[rows >= model.rows] = -1
        found[number, places] = rows
        padding = np.setdiff1d(np.arange(min(model.rows, size)), places)
        padding = np.setdiff1d(padding, np.fromiter(model.ids.values(), np.int64))
        found[number, padding] = padding
    return found


def _spellings(ids: Mapping[str, int], donor: Vocabulary) -> list[bytes]:
    """Return the text of every token of the new vocabulary, in its order."""
    texts = spelled(ids, donor.added, donor.alphabet)
    back = {number: text for text, number in texts.items()}
    return [back.get(number, b"") for number in ids.values()]


def row_maps(own: Numbers, base: int | None) -> list[RowMap]:
    """Return each model's map: its own rows, else the base's, else averages of those there are.

    Args:
        own: from `own_rows`.
        base: the model whose row is taken where a model has none; the average without.
    """
    has = own >= 0
    count = has.sum(axis=0)
    pick = np.where(count == 0, MEAN, np.where(count == 1, has.argmax(axis=0), AVERAGE))
    if base is not None:
        pick = np.where(has[base], base, pick)
    pick = pick.astype(np.int64)
    row = np.where(pick >= 0, own[np.maximum(pick, 0), np.arange(own.shape[1])], -1)
    return [
        RowMap(
            number=number,
            pick=np.where(mine >= 0, number, pick),
            row=np.where(mine >= 0, mine, row),
            own=own,
        )
        for number, mine in enumerate(own)
    ]
