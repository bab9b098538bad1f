"""Children scored one by one beside their parent, which is fed the same windows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The tokens of all documents for one model and what they cost it; its weights are gone."""

    source: Source
    dtype: str
    parameters: int
    encoded: Sequence[Encoded]
    scores: Sequence[Scores]
    not_compared: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ready:
    source: Source
    loaded: Loaded
    encoded: Sequence[Encoded]


def score_all(
    sources: Sequence[Source], documents: Sequence[Document], settings: Settings
) -> list[Scored]:
    """Score the first model, and the others against it; two are in memory at most.

    Raises:
        TrainError: A model cannot be loaded whole, or cannot be scored.
    """
    parent = _ready(sources[0], documents, settings)
    own: list[Scores] | None = None
    found = []
    for source in sources[1:]:
        child = _ready(source, documents, settings)
        reason = _not_comparable(parent, child)
        scores = _score(child, documents, settings, None if reason else parent.loaded)
        found.append(_scored(child, scores, reason))
        if own is None and reason is None:
            own = [s.of_reference() for s in scores]
        del child  # before the next one is loaded
    return [_scored(parent, own or _score(parent, documents, settings), None), *found]


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


def _scored(ready: _Ready, scores: Sequence[Scores], not_compared: str | None) -> Scored:
    return Scored(
        source=ready.source,
        dtype=ready.loaded.dtype,
        parameters=ready.loaded.parameters,
        encoded=ready.encoded,
        scores=scores,
        not_compared=not_compared,
    )
