"""Packed rows of one corpus, and their order in every epoch.

Axis letter: t tokens of a row.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from surgery.errors import RecipeError
from surgery.recover.corpus import Corpus
from surgery.recover.packing import Pieces, best_fit, cut

if TYPE_CHECKING:
    Ints = npt.NDArray[np.int64]

IGNORED = -100  # a target that is not predicted, as torch's cross-entropy has it


@dataclass(frozen=True, slots=True)
class Row:
    """What a model is fed at once; all arrays are int64 [t].

    Attributes:
        ids: token ids; the padding at the end holds zeros.
        targets: the next token's id, or -100 where nothing is predicted.
        positions: from 0 with every document; they go on in the padding.
        fill: tokens without padding.
    """

    ids: "Ints"
    targets: "Ints"
    positions: "Ints"
    fill: int


@dataclass(frozen=True, slots=True)
class Pool:
    """Packed pieces of one corpus, and their order in each epoch.

    Attributes:
        first: int64 [rows + 1], the first piece of each row, and the end.
        fills: int64 [rows], tokens of each row without padding.
        seed: of the order: the run's, and the pool's own.
    """

    corpus: Corpus
    pieces: Pieces
    first: "Ints"
    fills: "Ints"
    seed: tuple[int, int]
    orders: dict[int, "Ints"] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.fills)

    def order(self, epoch: int) -> "Ints":
        """Return the rows of an epoch in their order; those of two epochs are kept."""
        found = self.orders.get(epoch)
        if found is None:
            found = _generator(*self.seed, epoch + 1).permutation(len(self))
            if len(self.orders) > 1:
                self.orders.clear()
            self.orders[epoch] = found
        return found

    def place(self, rank: int) -> int:
        """Return the row that comes at a rank, which counts on over epochs."""
        epoch, within = divmod(rank, len(self))
        return int(self.order(epoch)[within])

    def row(self, place: int, context: int) -> Row:
        """Return a stored row."""
        ids, targets = np.zeros(context, np.int64), np.full(context, IGNORED, np.int64)
        positions = np.zeros(context, np.int64)
        at = 0
        for piece in range(self.first[place], self.first[place + 1]):
            size = _lay(self.corpus, self.pieces, piece, ids[at:], targets[at:])
            positions[at:] = np.arange(context - at)
            at += size
        return Row(ids, targets, positions, at)


def make_pool(
    corpus: Corpus, documents: "Ints", *, context: int, seed: tuple[int, int], packed: bool
) -> Pool:
    """Cut and pack documents, longest first, equal lengths in an order of the seed.

    Raises:
        RecipeError: none of them has a token to predict.
    """
    pieces = cut(corpus, documents, context=context)
    if not len(pieces):
        raise RecipeError("--data", "nothing to predict is left", "choose more documents")
    shuffled = pieces.taken(_generator(*seed, 0).permutation(len(pieces)))
    sizes = shuffled.length + shuffled.opened
    shuffled = shuffled.taken(np.argsort(-sizes, kind="stable"))
    sizes = shuffled.length + shuffled.opened
    bins = best_fit(sizes, room=context) if packed else np.arange(len(sizes))
    by_bin = np.argsort(bins, kind="stable")
    first = np.concatenate(([0], np.cumsum(np.bincount(bins))))
    fills = np.bincount(bins, weights=sizes).astype(np.int64)
    return Pool(corpus, shuffled.taken(by_bin), first, fills, seed)


def _lay(corpus: Corpus, pieces: Pieces, piece: int, ids: "Ints", targets: "Ints") -> int:
    """Lay a piece at the beginning of what is left of a row; return its size."""
    start, length = int(pieces.start[piece]), int(pieces.length[piece])
    opened = int(pieces.opened[piece])
    if opened and corpus.opening is not None:
        ids[0] = corpus.opening
    ids[opened : opened + length] = corpus.ids[start : start + length]
    after = slice(start + 1, start + length + 1)
    following = np.where(corpus.wanted[after], corpus.ids[after], IGNORED)
    targets[opened : opened + len(following)] = following
    return length + opened


def _generator(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
