"""What an evaluation finds, as values that turn into a plain dict for JSON."""

from dataclasses import asdict, dataclass
from typing import Any

from surgery.evaluate.statistics import Difference


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """How far a child's predictions are from its parent's, per scored token.

    Attributes:
        mean: Mean of KL(parent || child), in nats; the others are its quantiles.
        median: The 50% quantile.
        p95: The 95% quantile.
        p99: The 99% quantile.
        agreement: Share of tokens at which both rank the same token first.
    """

    mean: float
    median: float
    p95: float
    p99: float
    agreement: float


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
class ModelFigures:
    """One model on all texts.

    Attributes:
        name: The model, by the last part of its path or ref.
        ref: What the user typed.
        revision: The commit of a hub ref, or None.
        parent: Whether the others are compared with it.
        parameters: How many numbers it holds; a tied one counts once.
        dtype: What it computed in.
        mark: Where the beginning-of-sequence mark stands: "window", "document" or "none".
        not_compared: Why there is no divergence from the parent, or None.
        overall: All texts together.
        domains: One for each file.
        per_document: One for each document.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Models on texts, the parent first, and the settings that produced the figures.

    Attributes:
        models: The parent, then the others in the order they were named.
        context: Tokens a model is fed at most.
        stride: Tokens by which a window moves on.
        batch_tokens: Tokens fed at once.
        device: Where the models ran.
        bootstrap: Draws of the paired bootstrap.
        seed: Its seed.
        versions: Of the libraries that decide the figures.
    """

    models: tuple[ModelFigures, ...]
    context: int
    stride: int
    batch_tokens: int
    device: str
    bootstrap: int
    seed: int
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists, numbers and strings."""
        return {"format": "surgery-eval-1", **asdict(self)}
