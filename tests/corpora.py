"""Corpora of known token ids, without files and tokenizers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from surgery.recover.corpus import Corpus

OPENING = 256  # a mark that also opens every row in which a document goes on


def corpus_of(documents: Sequence[Sequence[int]], *, opening: int | None = None) -> Corpus:
    """The documents one after another; every token but the first of each is to be predicted."""
    lengths = [len(ids) for ids in documents]
    starts = np.cumsum([0, *lengths], dtype=np.int64)
    wanted = np.ones(sum(lengths), np.bool_)
    wanted[starts[:-1]] = False
    file = {"path": "made.jsonl", "kind": "jsonl", "sha256": "", "empty": 0}
    return Corpus(
        ids=np.concatenate([np.asarray(ids, np.int32) for ids in documents]),
        wanted=wanted,
        starts=starts,
        lines=np.arange(1, len(documents) + 1),
        sources=np.zeros(len(documents), np.int32),
        files=({**file, "documents": len(documents)},),
        opening=opening,
    )
