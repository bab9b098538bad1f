"""Documents laid into rows of one length, with little padding."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from surgery.recover.corpus import Corpus

if TYPE_CHECKING:
    Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """Parts of documents that fit in a row; all arrays have shape [pieces].

    Attributes:
        start: its first token in the corpus.
        length: tokens of the corpus that it holds.
        opened: 1 where the mark is put in front again, because a document goes on here.
    """

    start: "Ints"
    length: "Ints"
    opened: "Ints"

    def __len__(self) -> int:
        return len(self.start)

    def taken(self, which: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> "Pieces":
        """Return some of them, in the order asked for."""
        return Pieces(start=self.start[which], length=self.length[which], opened=self.opened[which])


def cut(corpus: Corpus, documents: "Ints", *, context: int) -> Pieces:
    """Cut documents into pieces of at most `context` tokens; what predicts nothing is left out.

    The last token of a piece still predicts the first of the next one, so that each token is
    predicted once. A piece that goes on does not see what came before it.
    """
    start, end = corpus.starts[documents], corpus.starts[documents + 1]
    again = corpus.opening is not None
    step = context - again
    counts = 1 + np.maximum(0, -(-(end - start - context) // step))
    first = np.cumsum(counts) - counts
    within = np.arange(counts.sum()) - np.repeat(first, counts)
    opened = (within > 0).astype(np.int64) * again
    begin = np.repeat(start, counts) + np.where(within > 0, context + (within - 1) * step, 0)
    length = np.minimum(np.repeat(end, counts) - begin, context - opened)
    found = Pieces(start=begin, length=length, opened=opened)
    sums = np.concatenate(([0], np.cumsum(corpus.wanted)))
    last = np.minimum(begin + length + 1, np.repeat(end, counts))
    return found.taken(sums[last] > sums[begin + 1])


def best_fit(lengths: "Ints", *, room: int) -> "Ints":
    """Return the bin of each piece, int64 [pieces], by best fit in the order given.

    A piece goes into the bin that it leaves least room in, or into a new one. Given from long to
    short, that is best-fit decreasing. The rooms that are left somewhere are the bits of one
    integer, so that the next larger one is found at once.

    Source: arXiv 2404.10830, section 3.2 (there a segment tree over the rooms).
    """
    bins = np.empty(len(lengths), np.int64)
    by_room: dict[int, list[int]] = {}
    rooms, used = 0, 0
    for piece, length in enumerate(lengths.tolist()):
        fitting = rooms >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            chosen = by_room[left].pop()
            if not by_room[left]:
                rooms ^= 1 << left
        else:
            left, chosen, used = room, used, used + 1
        bins[piece] = chosen
        if left > length:
            by_room.setdefault(left - length, []).append(chosen)
            rooms |= 1 << (left - length)
    return bins
