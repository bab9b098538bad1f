"""What models are judged by: held-out texts, or tasks, document by document."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.errors import RecipeError, TrainError
from surgery.evaluate.accuracy import mean_interval
from surgery.evaluate.answers import answer
from surgery.evaluate.choices import Questions, read_questions
from surgery.evaluate.documents import Document, read_documents
from surgery.evaluate.harness import check_tasks, run_tasks
from surgery.evaluate.load import Loaded, Source, find_device, find_dtype, open_source
from surgery.evaluate.pairs import Settings
from surgery.evaluate.panel import shared_context
from surgery.evaluate.score import score
from surgery.evaluate.statistics import paired_difference
from surgery.evaluate.tasks import Outcome
from surgery.evaluate.tokens import Encoded, encode

Floats = npt.NDArray[np.float64]

# Figures of documents of which less is better: a soup is not chosen by them the wrong way round.
_LOWER = ("perplexity", "bits_per_byte", "loss", "brier", "error", "wer", "ter")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Texts or tasks, read and checked; one of the two.

    Attributes:
        digests: SHA-256 of each file that was named, by its name.
    """

    documents: tuple[Document, ...] = ()
    questions: tuple[Questions, ...] = ()
    tasks: tuple[str, ...] = ()
    digests: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def read(
        cls,
        texts: Sequence[str | Path] = (),
        *,
        tasks: Sequence[str] = (),
        pairs: Sequence[str | Path] = (),
    ) -> "HeldOut":
        """Read what models are judged by, before one is loaded.

        Raises:
            RecipeError: nothing is named, or texts and tasks at once.
            CheckpointError: a file is missing or is not what it should be.
        """
        if bool(texts) == bool(tasks or pairs):
            fact = "are named at once" if texts else "are both missing"
            remedy = "judge by --text, or by --task and --pairs"
            raise RecipeError("texts and tasks", fact, remedy)
        documents = read_documents([Path(text) for text in texts]) if texts else ()
        questions = read_questions([Path(path) for path in pairs])
        check_tasks(tasks)
        files = [Path(name) for name in (*texts, *pairs, *tasks) if Path(name).is_file()]
        digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        return cls(documents=documents, questions=questions, tasks=tuple(tasks), digests=digests)

    @property
    def domains(self) -> dict[str, list[int]]:
        """The documents of each file of text, by their places."""
        found: dict[str, list[int]] = {}
        for place, document in enumerate(self.documents):
            found.setdefault(document.domain, []).append(place)
        return found

    @property
    def unit(self) -> str:
        """What a figure is."""
        return "bits per byte" if self.documents else "accuracy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A model's figure minus another's, over the same documents.

    Attributes:
        figure: below zero is better for bits per byte, above zero for accuracy.
        low, high: 95% interval by a bootstrap over documents; None for too few of them.
        verdict: "better", "worse", "not distinguishable", "equal" or "too few documents".
    """

    figure: float
    low: float | None
    high: float | None
    verdict: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One model on all documents.

    Attributes:
        values: [documents, 2]: nats and bytes of a text; the value and one of a task.
        lower: whether less is better: nats.
    """

    values: Floats
    lower: bool

    @property
    def figure(self) -> float:
        """Bits per byte, or the mean over all documents of all tasks."""
        total, size = self.values.sum(0)
        return float(total / size / (math.log(2) if self.lower else 1))

    def beats(self, other: "Result") -> bool:
        """Whether the figure is better, strictly."""
        return self.figure < other.figure if self.lower else self.figure > other.figure

    def only(self, chosen: Sequence[int]) -> "Result":
        """Return the result on some of the documents."""
        return Result(values=self.values[list(chosen)], lower=self.lower)

    def beside(self, other: "Result", *, draws: int, seed: int) -> Change:
        """Compare with another model's result, document by document."""
        if self.lower:
            d = paired_difference(self.values, other.values, draws=draws, seed=seed)
            return Change(figure=d.bits_per_byte, low=d.low, high=d.high, verdict=d.verdict)
        apart = self.values[:, 0] - other.values[:, 0]
        low, high = mean_interval(apart, draws=draws, seed=seed) or (None, None)
        return Change(figure=float(apart.mean()), low=low, high=high, verdict=_verdict(low, high))


def _verdict(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return "too few documents"
    if low == high == 0:
        return "equal"
    if low <= 0 <= high:
        return "not distinguishable"
    return "better" if low > 0 else "worse"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Measures models on what is held out; tokens are kept from one to the next."""

    held_out: HeldOut
    settings: Settings
    _encoded: dict[str, list[Encoded]] = field(default_factory=dict)

    def measure(self, loaded: Loaded, source: Source) -> Result:
        """Measure a model in memory.

        Args:
            source: whose tokenizer to read the documents with.

        Raises:
            TrainError: it cannot be scored, or a task gives no value for each document.
        """
        if self.held_out.documents:
            return Result(values=self._texts(loaded, source), lower=True)
        return Result(values=self._tasks(loaded, source), lower=False)

    def _texts(self, loaded: Loaded, source: Source) -> Floats:
        documents = self.held_out.documents
        if source.ref not in self._encoded:
            self._encoded[source.ref] = encode(source.tokenizer, documents, mark=source.mark)
        encoded = self._encoded[source.ref]
        scores = score(
            loaded,
            encoded,
            names=[document.name for document in documents],
            context=self.settings.context,
            stride=self.settings.stride,
            batch_tokens=self.settings.batch_tokens,
        )
        nats = [float(s.nats.sum(dtype=np.float64)) for s in scores]
        found = np.array([nats, [e.size for e in encoded]], dtype=np.float64).T
        for domain, chosen in self.held_out.domains.items():
            if not found[chosen, 1].sum():
                raise TrainError(domain, "it is too short to score a token", "give a longer text")
        return found

    def _tasks(self, loaded: Loaded, source: Source) -> Floats:
        shared: dict[str, Any] = {
            "context": self.settings.context,
            "batch_tokens": self.settings.batch_tokens,
        }
        found = [
            answer(loaded, source.tokenizer, each, mark=source.mark, **shared)
            for each in self.held_out.questions
        ]
        if self.held_out.tasks:
            names, seed = self.held_out.tasks, self.settings.seed
            found += run_tasks(loaded, source.tokenizer, names, seed=seed, **shared)
        values = [value for each in found for value in _values(each)]
        return np.array([values, [1.0] * len(values)]).T


def _values(found: Outcome) -> list[float]:
    """Return what each document scores, in the order of the documents' names."""
    if any(word in found.metric for word in _LOWER):
        fact = f"is judged by {found.metric}, of which less is better"
        raise TrainError(found.task, fact, "name tasks with an accuracy, or judge by --text")
    if not found.documents or not all(map(math.isfinite, found.documents.values())):
        fact = "gives no value for each document, so that models cannot be paired"
        raise TrainError(found.task, fact, "name another task, or judge by --text")
    return [found.documents[name] for name in sorted(found.documents)]


def open_sources(refs: Sequence[str], scratch: ExitStack) -> list[Source]:
    """Read config and tokenizer of every model."""
    return [open_source(ref, scratch) for ref in refs]


def settle(
    sources: Sequence[Source],
    *,
    context: int | None,
    batch_tokens: int,
    device: str,
    seed: int,
) -> Settings:
    """Return how all models are scored: alike, as `surgery eval` scores them by default.

    Raises:
        RecipeError: an option makes no sense for these models or this machine.
    """
    if batch_tokens < 1:
        raise RecipeError("--batch-tokens", f"{batch_tokens} is no batch", "give 1 or more")
    length, place = shared_context(sources, context), find_device(device)
    if length < 1:
        raise RecipeError("--context", f"{length} is no context", "give 1 or more")
    return Settings(
        context=length,
        stride=max(1, length // 2),
        batch_tokens=batch_tokens,
        device=place,
        dtype=find_dtype(None, place),
        progress=None,
        seed=seed,
    )
