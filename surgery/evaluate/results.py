"""What an evaluation finds, as values that turn into a plain dict for JSON."""

from dataclasses import asdict, dataclass
from typing import Any

from surgery.evaluate.cka import Similarity
from surgery.evaluate.gates import Gated
from surgery.evaluate.samples import Sample
from surgery.evaluate.speed import Speed
from surgery.evaluate.statistics import Difference
from surgery.evaluate.tasks import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """How far a child's predictions are from its parent's, per scored token.

    Attributes:
        mean: Mean of KL(parent || child), in nats; the others are its quantiles.
        median: The 50% quantile.
        p95: The 95% quantile.
        p99: The 99% quantile.
        agreement: Share of tokens at which both rank the same token first.
        logit_rms: Root of the mean over tokens and vocabulary of (child - parent) squared.
    """

    mean: float
    median: float
    p95: float
    p99: float
    agreement: float
    logit_rms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One model on one text: a document, a file, or all of them.

    Attributes:
        name: The document or the file, or "overall".
        documents: How many documents it is.
        tokens: Tokens scored.
        unknown: Scored tokens that the tokenizer could only call unknown.
        bytes: UTF-8 bytes of raw text that the scored tokens stand for.
        nats: Negative log-likelihood in all.
        bits_per_byte: nats / (ln 2 * bytes); None where there is no byte to score.
        perplexity: exp(nats / tokens), to compare only where the tokenizer is the same; None where
            there is no token to score, or the figure is beyond any float.
        divergence: Against the parent, or None.
        difference: From the parent, with its interval, or None; documents have none.
    """

    name: str
    documents: int
    tokens: int
    unknown: int
    bytes: int
    nats: float
    bits_per_byte: float | None
    perplexity: float | None
    divergence: Divergence | None = None
    difference: Difference | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A child beside a parent on one text: a file, or all of them."""

    name: str
    divergence: Divergence | None
    difference: Difference | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Against:
    """A child beside one parent.

    Attributes:
        name: The parent, by the last part of its path or ref.
        ref: What the user typed for it.
        not_compared: Why there is no divergence, or None.
        overall: All texts together.
        domains: One for each file.
        weights: How far the weights are apart, as `surgery diff --json` tells it, or None.
        similarity: How alike the layers are, or None.
    """

    name: str
    ref: str
    not_compared: str | None
    overall: Comparison
    domains: tuple[Comparison, ...]
    weights: dict[str, Any] | None = None
    similarity: Similarity | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFigures:
    """One model on all texts.

    Attributes:
        name: The model, by the last part of its path or ref.
        ref: What the user typed.
        revision: The commit of a hub ref, or None.
        parent: Whether the children are compared with it.
        parameters: How many numbers it holds; a tied one counts once.
        dtype: What it computed in.
        mark: Where the beginning-of-sequence mark stands: "window", "document" or "none".
        not_compared: Why there is no divergence from the first parent, or None.
        overall: All texts together.
        domains: One for each file.
        per_document: One for each document.
        against: A child beside each parent; the figures of `overall`, `domains` and `per_document`
            are beside the first.
        samples: What it writes, where that was asked for.
        speed: How fast it is and what it holds, likewise.
    """

    name: str
    ref: str
    revision: str | None
    parent: bool
    parameters: int
    dtype: str
    mark: str
    not_compared: str | None
    overall: Figures
    domains: tuple[Figures, ...]
    per_document: tuple[Figures, ...]
    against: tuple[Against, ...] = ()
    samples: tuple[Sample, ...] = ()
    speed: Speed | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Models on texts, parents first, and the settings that produced the figures.

    Attributes:
        models: The parents, then the others in the order they were named.
        context: Tokens a model is fed at most.
        stride: Tokens by which a window moves on.
        batch_tokens: Tokens fed at once.
        device: Where the models ran.
        bootstrap: Draws of the paired bootstrap.
        seed: Its seed.
        versions: Of the libraries that decide the figures.
        tasks: Accuracies on tasks and pairs, and what they show, where that was asked for.
        gates: Limits that were set, and whether they hold.
    """

    models: tuple[ModelFigures, ...]
    context: int
    stride: int
    batch_tokens: int
    device: str
    bootstrap: int
    seed: int
    versions: dict[str, str]
    tasks: tuple[Task, ...] = ()
    gates: tuple[Gated, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists, numbers and strings."""
        plain: dict[str, Any] = _plain({"format": "surgery-eval-1", **asdict(self)})
        return plain


def _plain(value: Any) -> Any:  # noqa: ANN401 - whatever JSON holds
    """Return lists for tuples, as they come back from a file."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
