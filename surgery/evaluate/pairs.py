"""Children scored one by one beside each parent, which is fed the same windows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from surgery.evaluate.cka import Similarity, similarity
from surgery.evaluate.documents import Document
from surgery.evaluate.load import Loaded, Source, load
from surgery.evaluate.score import Scores, score
from surgery.evaluate.tokens import Encoded, difference_between, encode

if TYPE_CHECKING:
    import torch

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to score: lengths in tokens, and where and in what to compute."""

    context: int
    stride: int
    batch_tokens: int
    device: "torch.device"
    dtype: "torch.dtype | str"
    progress: Progress | None
    maps: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What a child's tokens showed beside one parent; without scores where they do not compare."""

    scores: Sequence[Scores] | None
    not_compared: str | None
    similarity: Similarity | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The tokens of all documents for one model and what they cost it; its weights are gone.

    Attributes:
        beside: one for each parent, in their order; none for a parent.
    """

    source: Source
    dtype: str
    parameters: int
    encoded: Sequence[Encoded]
    scores: Sequence[Scores]
    beside: tuple[Beside, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ready:
    source: Source
    loaded: Loaded
    encoded: Sequence[Encoded]


def score_all(
    sources: Sequence[Source],
    documents: Sequence[Document],
    settings: Settings,
    *,
    parents: int = 1,
) -> list[Scored]:
    """Score the first `parents` models, and the others against each; two are in memory at most.

    Raises:
        TrainError: A model cannot be loaded whole, or cannot be scored.
    """
    own, children = [], sources[parents:]
    found: list[Scored | None] = [None] * len(children)
    for source in sources[:parents]:
        parent, scored = _against(source, children, found, documents, settings)
        own.append(parent)
        found = [*scored]
    return [*own, *(child for child in found if child is not None)]


def _against(
    source: Source,
    children: Sequence[Source],
    before: Sequence[Scored | None],
    documents: Sequence[Document],
    settings: Settings,
) -> tuple[Scored, list[Scored]]:
    """Score one parent, and add what each child is beside it to what was known of the child."""
    parent = _ready(source, documents, settings)
    own: list[Scores] | None = None
    found = []
    for known, each in zip(before, children, strict=True):
        child = _ready(each, documents, settings)
        beside = _beside(child, parent, documents, settings)
        if own is None and beside.scores is not None:
            own = [s.of_reference() for s in beside.scores]
        if known is None:
            known = _scored(child, beside.scores or _score(child, documents, settings))  # noqa: PLW2901 - told once
        found.append(replace(known, beside=(*known.beside, beside)))
        del child  # before the next one is loaded
    return _scored(parent, own or _score(parent, documents, settings)), found


def _beside(
    child: _Ready, parent: _Ready, documents: Sequence[Document], settings: Settings
) -> Beside:
    reason = _not_comparable(parent, child)
    if reason is not None:
        return Beside(scores=None, not_compared=reason)
    scores = _score(child, documents, settings, parent.loaded)
    if not settings.maps:
        return Beside(scores=scores, not_compared=None)
    alike = similarity(
        child.loaded,
        parent.loaded,
        child.encoded,
        context=settings.context,
        seed=settings.seed,
    )
    return Beside(scores=scores, not_compared=None, similarity=alike)


def _ready(source: Source, documents: Sequence[Document], settings: Settings) -> _Ready:
    encoded = encode(source.tokenizer, documents, mark=source.mark)
    loaded = load(source, device=settings.device, dtype=settings.dtype)
    return _Ready(source=source, loaded=loaded, encoded=encoded)


def _not_comparable(parent: _Ready, child: _Ready) -> str | None:
    widths = child.loaded.vocabulary, parent.loaded.vocabulary
    if widths[0] != widths[1]:
        return f"the logits differ in width: {widths[0]} against the parent's {widths[1]}"
    pairs = list(zip(parent.encoded, child.encoded, strict=True))
    return difference_between(parent.source.tokenizer, child.source.tokenizer, pairs)


def _score(
    ready: _Ready,
    documents: Sequence[Document],
    settings: Settings,
    reference: Loaded | None = None,
) -> list[Scores]:
    def report(fed: int, total: int) -> None:
        if settings.progress is not None:
            settings.progress(ready.source.name, fed, total)

    return score(
        ready.loaded,
        ready.encoded,
        names=[document.name for document in documents],
        context=settings.context,
        stride=settings.stride,
        batch_tokens=settings.batch_tokens,
        reference=reference,
        progress=report,
    )


def _scored(ready: _Ready, scores: Sequence[Scores]) -> Scored:
    return Scored(
        source=ready.source,
        dtype=ready.loaded.dtype,
        parameters=ready.loaded.parameters,
        encoded=ready.encoded,
        scores=scores,
    )
