"""From token scores to the figures of documents, files and the whole."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from surgery.errors import TrainError
from surgery.evaluate.documents import Document
from surgery.evaluate.pairs import Scored
from surgery.evaluate.results import Divergence, Figures, ModelFigures
from surgery.evaluate.score import Scores
from surgery.evaluate.statistics import bits_per_byte, paired_difference, quantiles


def tabulate(
    documents: Sequence[Document], scored: Sequence[Scored], *, draws: int, seed: int
) -> tuple[ModelFigures, ...]:
    """Return the figures of all models; the first is the parent, the others differ from it.

    Raises:
        TrainError: A file has no token that can be scored.
    """
    parent, *children = [_model(documents, each, parent=each is scored[0]) for each in scored]
    return (
        parent,
        *(_with_difference(documents, c, parent, draws=draws, seed=seed) for c in children),
    )


def _model(documents: Sequence[Document], scored: Scored, *, parent: bool) -> ModelFigures:
    everything = range(len(documents))
    domains = dict.fromkeys(document.domain for document in documents)
    return ModelFigures(
        name=scored.source.name,
        ref=scored.source.ref,
        revision=scored.source.revision,
        parent=parent,
        parameters=scored.parameters,
        dtype=scored.dtype,
        mark=scored.source.mark.kind,
        not_compared=scored.not_compared,
        overall=_whole("overall", scored, everything),
        domains=tuple(_whole(name, scored, _members(documents, name)) for name in domains),
        per_document=tuple(_figures(documents[i].name, scored, [i]) for i in everything),
    )


def _with_difference(
    documents: Sequence[Document],
    child: ModelFigures,
    parent: ModelFigures,
    *,
    draws: int,
    seed: int,
) -> ModelFigures:
    mine, theirs = (
        np.array([(f.nats, f.bytes) for f in model.per_document]) for model in (child, parent)
    )

    def add(figures: Figures, chosen: Sequence[int]) -> Figures:
        found = paired_difference(mine[chosen], theirs[chosen], draws=draws, seed=seed)
        return replace(figures, difference=found)

    return replace(
        child,
        overall=add(child.overall, range(len(documents))),
        domains=tuple(add(f, _members(documents, f.name)) for f in child.domains),
    )


def _members(documents: Sequence[Document], domain: str) -> list[int]:
    return [i for i, document in enumerate(documents) if document.domain == domain]


def _whole(name: str, scored: Scored, chosen: Sequence[int]) -> Figures:
    figures = _figures(name, scored, chosen)
    if figures.bits_per_byte is None:
        raise TrainError(name, "it is too short to score a token", "give a longer text")
    return figures


def _figures(name: str, scored: Scored, chosen: Sequence[int]) -> Figures:
    encoded, scores = [scored.encoded[i] for i in chosen], [scored.scores[i] for i in chosen]
    nats = float(sum(s.nats.sum(dtype=np.float64) for s in scores))
    tokens, size = sum(len(s.nats) for s in scores), sum(e.size for e in encoded)
    return Figures(
        name=name,
        documents=len(scores),
        tokens=tokens,
        unknown=sum(e.unknown for e in encoded),
        bytes=size,
        nats=nats,
        bits_per_byte=bits_per_byte(nats, size) if size else None,
        perplexity=_perplexity(nats, tokens),
        divergence=_divergence(scores),
    )


def _perplexity(nats: float, tokens: int) -> float | None:
    try:
        return math.exp(nats / tokens)
    except (ZeroDivisionError, OverflowError):
        return None


def _divergence(scores: Sequence[Scores]) -> Divergence | None:
    parts = [s.divergence for s in scores if s.divergence is not None]
    agreed = [s.agreement for s in scores if s.agreement is not None]
    if not sum(map(len, parts)):
        return None
    values = np.concatenate(parts)
    median, p95, p99 = quantiles(values, (0.5, 0.95, 0.99))
    return Divergence(
        mean=float(values.mean(dtype=np.float64)),
        median=median,
        p95=p95,
        p99=p99,
        agreement=float(np.concatenate(agreed).mean(dtype=np.float64)),
    )
