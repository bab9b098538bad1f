"""Rows to train on: a pure function of the data, a seed and an index."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from surgery.errors import RecipeError, TrainError
from surgery.evaluate.tokens import Mark
from surgery.recover.corpus import Corpus, Progress, read_corpus
from surgery.recover.pool import IGNORED, Pool, Row, make_pool
from surgery.recover.sources import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Ints = npt.NDArray[np.int64]

__all__ = ["IGNORED", "Data", "Row", "Rows", "Source", "open_rows", "read_data"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Tokenized data.

    Attributes:
        main: what to learn.
        replay: what not to forget, or None.
        share: of rows that are replay.
    """

    main: Corpus
    replay: Corpus | None
    share: Fraction


def read_data(
    sources: Sequence[Source],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    mark: Mark,
    progress: Progress | None = None,
) -> Data:
    """Read and tokenize data and replay.

    Raises:
        CheckpointError: a file cannot be read, or a record is not what it should be.
        RecipeError: no data, differing shares, or a package or chat template is missing.
    """
    main = [source for source in sources if source.share is None]
    replay = [source for source in sources if source.share is not None]
    share = _share(replay)
    _check_sources(main, replay)
    found = read_corpus(main, tokenizer, mark=mark, progress=progress)
    _check_filled(found, "--data")
    if not replay:
        return Data(main=found, replay=None, share=Fraction(0))
    again = read_corpus(replay, tokenizer, mark=mark, progress=progress)
    _check_filled(again, "--replay-data")
    return Data(main=found, replay=again, share=share)


def open_rows(
    sources: Sequence[Source],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    context: int,
    seed: int,
    mark: Mark,
    packed: bool = True,
    progress: Progress | None = None,
) -> "Rows":
    """Read, tokenize and pack data.

    Raises:
        CheckpointError: a file cannot be read, or a record is not what it should be.
        RecipeError: no data, differing shares, or a package or chat template is missing.
    """
    data = read_data(sources, tokenizer, mark=mark, progress=progress)
    return Rows.of(data, context=context, seed=seed, packed=packed)


class Rows:
    """Rows of one length, in an order that knows no processes.

    Every prefix of the order has the share of replay, to within one row. Data and replay go
    through their own epochs, each in an order of its own.

    Attributes:
        context: tokens of a row.
        digest: SHA-256 of the data files, of all that shapes the rows, and of their tokens.
    """

    def __init__(self, data: Data, pools: Sequence[Pool], *, context: int, digest: str) -> None:
        self.data, self.context, self.digest = data, context, digest
        self._pools, self._share = tuple(pools), data.share

    @classmethod
    def of(
        cls,
        data: Data,
        *,
        context: int,
        seed: int,
        chosen: "Ints | None" = None,
        packed: bool = True,
    ) -> "Rows":
        """Pack tokenized data.

        Args:
            chosen: documents of the main data to take, by number; all by default.
            packed: several documents in a row; else each row holds one.

        Raises:
            RecipeError: nothing is left to predict.
        """
        picks = np.arange(len(data.main)) if chosen is None else np.sort(np.asarray(chosen))
        found = [(data.main, picks)]
        if data.replay is not None:
            found.append((data.replay, np.arange(len(data.replay))))
        pools = [
            make_pool(corpus, documents, context=context, seed=(seed, number), packed=packed)
            for number, (corpus, documents) in enumerate(found)
        ]
        facts = {"context": context, "seed": seed, "packed": packed, "share": str(data.share)}
        return cls(data, pools, context=context, digest=_digest(pools, picks, facts))

    def __len__(self) -> int:
        """Rows of an epoch: all of the main data once, and the replay between it."""
        one = self._share.denominator
        return (len(self._pools[0]) - 1) * one // (one - self._share.numerator) + 1

    @property
    def stored(self) -> int:
        """Rows that there are, replay included, whatever the order."""
        return sum(map(len, self._pools))

    @property
    def tokens(self) -> int:
        """Tokens of the first epoch without padding."""
        fills = np.concatenate([pool.fills for pool in self._pools])
        return int(fills[[self.place(index) for index in range(len(self))]].sum())

    def place(self, index: int) -> int:
        """Return which stored row comes at an index; the same row has the same place always."""
        before = index * self._share.numerator // self._share.denominator
        after = (index + 1) * self._share.numerator // self._share.denominator
        if after > before:
            return len(self._pools[0]) + self._pools[1].place(before)
        return self._pools[0].place(index - before)

    def row(self, index: int) -> Row:
        """Return the row at an index, which counts on over epochs."""
        return self.at(self.place(index))

    def at(self, place: int) -> Row:
        """Return a stored row."""
        main = len(self._pools[0])
        if place < main:
            return self._pools[0].row(place, self.context)
        return self._pools[1].row(place - main, self.context)

    def check_fits(self, embeddings: int, model: object) -> None:
        """Refuse a model that has no embedding for some token.

        Args:
            embeddings: rows of the model's embedding.
            model: the place to tell.

        Raises:
            TrainError: the tokenizer that the data was read with is not the model's.
        """
        highest = max(int(pool.corpus.ids.max()) for pool in self._pools)
        if highest >= embeddings:
            fact = f"token {highest} of the data has no embedding, there are {embeddings}"
            raise TrainError(model, fact, "use the tokenizer that belongs to the model")

    def summary(self) -> dict[str, Any]:
        """Return what to tell and record: files, counts, the share of padding."""
        filled = sum(int(pool.fills.sum()) for pool in self._pools)
        corpora = [pool.corpus for pool in self._pools]
        return {
            "files": [file for corpus in corpora for file in corpus.files],
            "documents": sum(map(len, corpora)),
            "duplicates": sum(corpus.duplicates for corpus in corpora),
            "empty": sum(file["empty"] for corpus in corpora for file in corpus.files),
            "rows": self.stored,
            "tokens": filled,
            "padding": 1 - filled / (self.stored * self.context),
            "digest": self.digest,
        }


def _share(replay: Sequence[Source]) -> Fraction:
    shares = {source.share for source in replay}
    if len(shares) > 1:
        fact = "the replay sources name different shares"
        raise RecipeError("--replay", fact, "give one share, which they have together")
    share = Fraction(next(iter(shares), None) or 0).limit_denominator(10**6)
    if replay and not 0 < share < 1:
        fact = f"{float(share):g} of the rows is outside 0 to 1, both excluded"
        raise RecipeError("--replay", fact, "for instance 0.05")
    return share


def _check_sources(main: Sequence[Source], replay: Sequence[Source]) -> None:
    if not main:
        raise RecipeError("--data", "no data is named", "give one or more files")
    for sources, option in ((main, "--data"), (replay, "--replay-data")):
        paths = [str(source.path) for source in sources]
        twice = next((path for path in paths if paths.count(path) > 1), None)
        if twice is not None:
            raise RecipeError(option, f"{twice} is named twice", "name each file once")


def _check_filled(corpus: Corpus, option: str) -> None:
    if not len(corpus):
        names = ", ".join(file["path"] for file in corpus.files)
        raise RecipeError(option, f"nothing to predict in {names}", "name a longer text")


def _digest(pools: Sequence[Pool], picks: "Ints", facts: dict[str, Any]) -> str:
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for pool in pools:
        found.update(json.dumps(pool.corpus.files, sort_keys=True).encode())
        for array in (pool.corpus.ids, pool.corpus.wanted, pool.corpus.starts):
            found.update(np.ascontiguousarray(array).data)
    found.update(picks.tobytes())
    return found.hexdigest()
