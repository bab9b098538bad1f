"""From token scores to the figures of documents, files and the whole."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from surgery.errors import TrainError
from surgery.evaluate.documents import Document
from surgery.evaluate.pairs import Beside, Scored
from surgery.evaluate.results import Against, Comparison, Divergence, Figures, ModelFigures
from surgery.evaluate.score import Scores
from surgery.evaluate.statistics import bits_per_byte, paired_difference, quantiles


def tabulate(
    documents: Sequence[Document], scored: Sequence[Scored], *, draws: int, seed: int
) -> tuple[ModelFigures, ...]:
    """Return the figures of all models: parents, and children beside each of them.

    The figures of a child hold its divergence and difference from the first parent.

    Raises:
        TrainError: A file has no token that can be scored.
    """
    parents = [_model(documents, each, parent=True) for each in scored if not each.beside]
    children = [
        _child(documents, each, parents, draws=draws, seed=seed) for each in scored if each.beside
    ]
    return (*parents, *children)


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
        not_compared=None if parent else scored.beside[0].not_compared,
        overall=_whole("overall", scored, everything),
        domains=tuple(_whole(name, scored, _members(documents, name)) for name in domains),
        per_document=tuple(_figures(documents[i].name, scored, [i]) for i in everything),
    )


def _child(
    documents: Sequence[Document],
    scored: Scored,
    parents: Sequence[ModelFigures],
    *,
    draws: int,
    seed: int,
) -> ModelFigures:
    child = _model(documents, scored, parent=False)
    against = tuple(
        _against(documents, child, parent, beside, draws=draws, seed=seed)
        for parent, beside in zip(parents, scored.beside, strict=True)
    )
    first = against[0]
    return replace(
        child,
        overall=_with(child.overall, first.overall),
        domains=tuple(_with(f, c) for f, c in zip(child.domains, first.domains, strict=True)),
        per_document=tuple(
            replace(f, divergence=_divergence(scored.beside[0].scores, [i]))
            for i, f in enumerate(child.per_document)
        ),
        against=against,
    )


def _with(figures: Figures, found: Comparison) -> Figures:
    return replace(figures, divergence=found.divergence, difference=found.difference)


def _against(
    documents: Sequence[Document],
    child: ModelFigures,
    parent: ModelFigures,
    beside: Beside,
    *,
    draws: int,
    seed: int,
) -> Against:
    mine, theirs = (
        np.array([(f.nats, f.bytes) for f in model.per_document]) for model in (child, parent)
    )

    def compare(name: str, chosen: Sequence[int]) -> Comparison:
        found = paired_difference(mine[chosen], theirs[chosen], draws=draws, seed=seed)
        divergence = _divergence(beside.scores, chosen)
        return Comparison(name=name, divergence=divergence, difference=found)

    return Against(
        name=parent.name,
        ref=parent.ref,
        not_compared=beside.not_compared,
        overall=compare("overall", range(len(documents))),
        domains=tuple(compare(f.name, _members(documents, f.name)) for f in child.domains),
        similarity=beside.similarity,
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
    )


def _perplexity(nats: float, tokens: int) -> float | None:
    try:
        return math.exp(nats / tokens)
    except (ZeroDivisionError, OverflowError):
        return None


def _divergence(scores: Sequence[Scores] | None, chosen: Sequence[int]) -> Divergence | None:
    parts = [scores[i] for i in chosen] if scores is not None else []
    if not sum(len(s.nats) for s in parts):
        return None
    values, agreed, squares = (
        np.concatenate([x for s in parts if (x := getattr(s, name)) is not None])
        for name in ("divergence", "agreement", "squares")
    )
    median, p95, p99 = quantiles(values, (0.5, 0.95, 0.99))
    return Divergence(
        mean=float(values.mean(dtype=np.float64)),
        median=median,
        p95=p95,
        p99=p99,
        agreement=float(agreed.mean(dtype=np.float64)),
        logit_rms=math.sqrt(float(squares.mean(dtype=np.float64))),
    )
