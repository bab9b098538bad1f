"""Documents as tokens in memory: 5 bytes a token."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from surgery.evaluate.tokens import Mark
from surgery.recover.chats import Tokens, check_chats, encode_chat
from surgery.recover.sources import Reader, Record, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Ints = npt.NDArray[np.int64]

Progress = Callable[[int, int], None]
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 1024, 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Documents of some sources, one after another.

    Attributes:
        ids: int32 [tokens], marks included.
        wanted: bool [tokens], whether a token is to be predicted; the first of a document never.
        starts: int64 [documents + 1], the first token of each document, and the end.
        lines: int64 [documents], the line or record of its source that a document came from.
        sources: int32 [documents], the number of that source.
        files: of each source its path, kind, digest, and counts of documents and empty ones.
        opening: the mark that also opens every row which a document goes on in, or None.
    """

    ids: npt.NDArray[np.int32]
    wanted: npt.NDArray[np.bool_]
    starts: "Ints"
    lines: "Ints"
    sources: npt.NDArray[np.int32]
    files: tuple[dict[str, Any], ...]
    opening: int | None

    def __len__(self) -> int:
        return len(self.lines)

    def name(self, document: int) -> str:
        """Return the file and line of a document."""
        return f"{self.files[self.sources[document]]['path']}:{self.lines[document]}"

    def tokens(self, document: int) -> npt.NDArray[np.int32]:
        """Return a document's token ids, int32 [tokens]."""
        return self.ids[self.starts[document] : self.starts[document + 1]]

    @property
    def duplicates(self) -> int:
        """Documents that are equal to one before them, token by token."""
        seen = {
            hashlib.blake2b(self.ids[a:b].tobytes(), digest_size=16).digest()
            for a, b in pairwise(self.starts)
        }
        return len(self) - len(seen)


@dataclass(slots=True)
class _Building:
    """A corpus that grows."""

    ids: list[npt.NDArray[np.int32]] = field(default_factory=list)
    wanted: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0

    def add(self, record: Record, tokens: Tokens) -> None:
        ids, wanted = tokens
        if not wanted.any():
            return
        wanted[:1] = False
        self.ids.append(ids)
        self.wanted.append(wanted)
        self.lines.append(record.line)
        self.sources.append(len(self.files))
        self.tokens += len(ids)

    def end_source(self, reader: Reader, before: int) -> None:
        self.files.append(
            {
                "path": str(reader.source.path),
                "kind": reader.source.found_kind,
                "sha256": reader.digest,
                "documents": len(self.lines) - before,
                "empty": reader.empty,
            }
        )


def read_corpus(
    sources: Sequence[Source],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    mark: Mark,
    progress: Progress | None = None,
) -> Corpus:
    """Read and tokenize every document, in order.

    A text gets the beginning-of-sequence mark in front where the tokenizer has one, as when it is
    scored, and the end mark behind; a chat has the marks that its template writes. Progress is
    told documents and tokens so far.

    Raises:
        CheckpointError: a file cannot be read, or a record is not what it should be.
        RecipeError: a package or a chat template is missing.
    """
    found = _Building()
    for source in sources:
        reader, before = Reader(source), len(found.lines)
        for batch in _batches(reader.read()):
            for record, tokens in _encoded(batch, tokenizer, mark):
                found.add(record, tokens)
            if progress is not None:
                progress(len(found.lines), found.tokens)
        found.end_source(reader, before)
    lengths = [0, *map(len, found.ids)]
    return Corpus(
        ids=np.concatenate([np.zeros(0, np.int32), *found.ids]),
        wanted=np.concatenate([np.zeros(0, np.bool_), *found.wanted]),
        starts=np.cumsum(lengths, dtype=np.int64),
        lines=np.asarray(found.lines, np.int64),
        sources=np.asarray(found.sources, np.int32),
        files=tuple(found.files),
        opening=mark.token if mark.every_window else None,
    )


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    characters = 0
    for record in records:
        batch.append(record)
        characters += len(record.text or "")
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encoded(
    batch: Sequence[Record], tokenizer: "PreTrainedTokenizerBase", mark: Mark
) -> Iterator[tuple[Record, Tokens]]:
    texts = [record.text for record in batch if record.text is not None]
    known = iter(_encoded_texts(texts, tokenizer, mark) if texts else ())
    for record in batch:
        if record.text is not None:
            yield record, next(known)
            continue
        check_chats(tokenizer, record.name)
        for tokens in encode_chat(tokenizer, record):
            yield record, tokens


def _encoded_texts(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", mark: Mark
) -> Iterator[Tokens]:
    found = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    front = [] if mark.token is None else [mark.token]
    end = tokenizer.eos_token_id
    for ids in found["input_ids"]:
        behind = [] if end is None or (ids and ids[-1] == end) else [end]
        whole = np.asarray([*front, *ids, *behind], np.int32)
        wanted = np.ones(len(whole), np.bool_)
        wanted[0] = False
        yield whole, wanted
