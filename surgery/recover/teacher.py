"""Teachers: a model that runs along, or its answers that were kept.

Axis letters: b rows of a batch, t tokens of a row, n = b t tokens, d width, k kept tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from surgery.errors import CheckpointError, RecipeError, TrainError
from surgery.evaluate.load import Loaded, find_device, find_dtype, first_line, load, open_source
from surgery.recover.answers import AnswersWriter, Size, open_answers
from surgery.recover.data import Row, Rows, read_data
from surgery.recover.distributed import put_away
from surgery.recover.fused import TeacherHidden, TeacherTopK, bent_
from surgery.recover.heads import Head, accepts_positions, head_of, states_of
from surgery.recover.isolation import keeps_apart
from surgery.recover.losses import BLOCK, BLOCKS
from surgery.recover.products import Product
from surgery.recover.sources import Source

Progress = Callable[[int, int], None]
FORMAT = "1"
LOWEST = -60_000.0  # float16 ends at -65504


class Fed(Protocol):
    """What a teacher is asked about: rows by number, as tensors too."""

    @property
    def indices(self) -> Sequence[int]:
        """Numbers of the rows."""

    @property
    def ids(self) -> Tensor:
        """Token ids, [b, t]."""

    @property
    def positions(self) -> Tensor:
        """Places within their documents, [b, t]."""


class OnlineTeacher:
    """A model in memory, in evaluation mode and without gradients.

    Attributes:
        layers: whether to give the states after each layer too.
    """

    def __init__(self, loaded: Loaded, *, student: Loaded, layers: bool = False) -> None:
        """Take a loaded model.

        Raises:
            RecipeError: it has another vocabulary than the student.
            TrainError: its head is of a kind that is not known.
        """
        check_vocabulary(loaded.path, loaded.vocabulary, student.vocabulary)
        self.path, self.model, self.layers = loaded.path, loaded.model, layers
        self.model.eval().requires_grad_(False)
        self.head = head_of(self.model)
        self.put_away()

    def batch(self, fed: Fed) -> TeacherHidden:
        """Return what its head gets at all n tokens.

        Raises:
            TrainError: the forward pass fails.
        """
        inputs = {"input_ids": fed.ids}
        if accepts_positions(self.model):
            inputs["position_ids"] = fed.positions
        try:
            with torch.no_grad():
                states = states_of(self.model, inputs, layers=self.layers)
        except (RuntimeError, ValueError, IndexError) as error:
            fact = f"the forward pass fails ({first_line(error)})"
            raise TrainError(self.path, fact, "lower the tokens fed at once") from error
        return TeacherHidden(states.hidden, self.head.renewed(self.model), states.layers)

    def put_away(self) -> None:
        """Leave what was gathered for the latest answer to the shards."""
        put_away(self.model)


class CachedTeacher:
    """Answers that `surgery teacher cache` kept."""

    def __init__(self, path: Path, rows: Rows, *, student: Loaded) -> None:
        """Open the file.

        Raises:
            CheckpointError: it is none, or not whole.
            RecipeError: it is of other rows, or of another vocabulary than the student's.
        """
        self.answers, self.rows = open_answers(path), rows
        told = self.answers.metadata
        if told.get("rows") != rows.digest:
            fact = "holds answers to other rows: data, tokenizer, context or seed differ"
            raise RecipeError(path, fact, "cache the teacher again with the options of this run")
        check_vocabulary(path, int(told.get("vocabulary", 0)), student.vocabulary)
        starts = self.answers.arrays["starts"]
        if len(starts) != rows.stored + 1 or starts[-1] != len(self.answers.arrays["tail"]):
            raise CheckpointError(path, "is not whole", "cache the teacher again")

    def put_away(self) -> None:
        """Nothing is gathered."""

    def batch(self, fed: Fed) -> TeacherTopK:
        """Return the answers at all n tokens; where nothing is predicted they tell nothing."""
        kept = self.answers.arrays["ids"].shape[1]
        count, each = fed.ids.numel(), fed.ids.shape[1]
        ids = np.tile(np.arange(kept), (count, 1))
        logits, tail = np.zeros((count, kept), np.float32), np.zeros(count, np.float32)
        for number, index in enumerate(fed.indices):
            place = self.rows.place(index)
            at = number * each + np.flatnonzero(self.rows.at(place).targets >= 0)
            ids[at], logits[at], tail[at] = self.answers.of(place)
        found = (torch.from_numpy(array).to(fed.ids.device) for array in (ids, logits, tail))
        return TeacherTopK(*found)


Teachers = OnlineTeacher | CachedTeacher


def check_vocabulary(teacher: object, theirs: int, mine: int) -> None:
    """Refuse a teacher whose answers are about other tokens.

    Raises:
        RecipeError: the numbers of tokens differ.
    """
    if theirs != mine:
        fact = f"has logits for {theirs} tokens, the student for {mine}"
        raise RecipeError(teacher, fact, "a teacher needs the student's vocabulary")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cached:
    """What was kept, and what it takes."""

    out: Path
    rows: int
    tokens: int
    nbytes: int
    top_k: int
    bytes_per_token: int


def cache_teacher(
    teacher: str | Path,
    sources: Sequence[Source],
    out: Path,
    *,
    top_k: int = 64,
    context: int = 2048,
    seed: int = 0,
    batch_tokens: int = 8192,
    device: str = "cpu",
    dtype: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Cached:
    """Run a teacher over data, and keep its likeliest tokens at every scored one.

    Args:
        sources: data and replay, as the recovery will be given them.
        top_k: tokens kept; all others are one number, their mass.
        context: tokens of a row, and
        seed: of the packing: those of the recovery.
        progress: called with rows done and rows in all.

    Raises:
        RecipeError: an option makes no sense, or `out` exists and `force` is not given.
        CheckpointError: the teacher or the data cannot be opened.
        TrainError: the teacher does not load whole, or its logits are not finite.
        PlanError: the disk has no room.
    """
    _check(out, top_k=top_k, context=context, batch_tokens=batch_tokens, force=force)
    place = find_device(device)
    with ExitStack() as scratch:
        source = open_source(teacher, scratch)
        if source.limit is not None and context > source.limit:
            fact = f"is more than {source.ref} reads, {source.limit} tokens"
            raise RecipeError(f"--context {context}", fact, f"give {source.limit} or less")
        data = read_data(sources, source.tokenizer, mark=source.mark)
        kind = find_dtype(dtype or ("bfloat16" if place.type == "cuda" else None), place)
        loaded = load(source, device=place, dtype=kind)
    rows = Rows.of(data, context=context, seed=seed, packed=keeps_apart(loaded))
    rows.check_fits(loaded.embeddings, source.ref)
    size = _size(rows, loaded.vocabulary, top_k)
    told = {"format": FORMAT, "rows": rows.digest, "vocabulary": str(size.vocabulary)}
    told |= {"teacher": source.name, "context": str(context), "seed": str(seed)}
    writer = AnswersWriter(out, size, told)
    writer.check_room()
    with writer:
        for done, answers in _answered(loaded, rows, max(batch_tokens // context, 1), top_k):
            writer.add(**answers)
            if progress:
                progress(done, rows.stored)
    return Cached(
        out=out,
        rows=rows.stored,
        tokens=size.tokens,
        nbytes=writer.size,
        top_k=top_k,
        bytes_per_token=size.bytes_per_token,
    )


def _size(rows: Rows, vocabulary: int, top_k: int) -> Size:
    if top_k >= vocabulary:
        fact = f"leaves nothing of the teacher's {vocabulary} tokens"
        raise RecipeError(f"--top-k {top_k}", fact, "64 is usual")
    counts = np.array([(rows.at(place).targets >= 0).sum() for place in range(rows.stored)])
    return Size(counts=counts, top_k=top_k, vocabulary=vocabulary)


def _check(out: Path, *, top_k: int, context: int, batch_tokens: int, force: bool) -> None:
    for option, value in (("top-k", top_k), ("batch-tokens", batch_tokens)):
        if value < 1:
            raise RecipeError(f"--{option} {value}", "is below 1")
    if context < 2:  # noqa: PLR2004 - one token has no next one
        raise RecipeError(f"--context {context}", "is below 2", "2048 is usual")
    if out.suffix != ".safetensors":
        raise RecipeError(out, "does not end in .safetensors", "name a file, not a directory")
    if out.exists() and not force:
        raise RecipeError(out, "exists already", "give --force to replace it")


@dataclass(frozen=True, slots=True)
class _Batch:
    indices: tuple[int, ...]
    ids: Tensor
    positions: Tensor
    scored: Tensor


def _batch(rows: Sequence[Row], device: torch.device) -> _Batch:
    stacked = (np.stack([getattr(r, name) for r in rows]) for name in ("ids", "positions"))
    ids, positions = (torch.from_numpy(array).to(device) for array in stacked)
    scored = torch.from_numpy(np.concatenate([row.targets for row in rows]) >= 0).to(device)
    return _Batch((), ids, positions, scored)


def _answered(
    loaded: Loaded, rows: Rows, size: int, top_k: int
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yield how many stored rows are done, and the answers to the latest of them."""
    teacher = OnlineTeacher(loaded, student=loaded)
    for start in range(0, rows.stored, size):
        end = min(start + size, rows.stored)
        batch = _batch([rows.at(place) for place in range(start, end)], loaded.device)
        hidden_nd = teacher.batch(batch).hidden[batch.scored]
        ids, logits, tail = top_of(hidden_nd, teacher.head, top_k)
        if not bool(logits.isfinite().all() & tail.isfinite().all()):
            fact = "gives logits that are not finite"
            raise TrainError(loaded.path, fact, "its weights are damaged, or --dtype is too small")
        arrays = {"ids": ids, "logits": logits.half(), "tail": tail.float()}
        yield end, {name: array.cpu().numpy() for name, array in arrays.items()}


@torch.no_grad()
def top_of(hidden_nd: Tensor, head: Head, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the likeliest ids [n, k], their log-probabilities, and the log-mass of the rest [n].

    Logits are made for a few tokens at a time.
    """
    exact = torch.promote_types(hidden_nd.dtype, torch.float32)
    block = BLOCKS.get(hidden_nd.device.type, BLOCK)
    product = Product(head.weight, hidden_nd.dtype, exact, block)
    found = []
    for part_cd in torch.split(hidden_nd, max(block // (exact.itemsize * head.vocabulary), 1)):
        logp_cv = bent_(product.out(part_cd, head.bias), head).log_softmax(-1)
        logp_ck, ids_ck = logp_cv.topk(top_k)
        tail_c = logp_cv.scatter_(1, ids_ck, -torch.inf).logsumexp(-1)
        found.append((ids_ck, logp_ck.clamp(min=LOWEST), tail_c.clamp(min=LOWEST)))
    ids_nk, logp_nk, tail_n = (torch.cat(parts) for parts in zip(*found, strict=True))
    return ids_nk, logp_nk, tail_n
