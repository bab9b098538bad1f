"""Which documents heal most: where the student lost most, without what contradicts itself.

Source: arXiv 2502.12594 (PASER), sections 3.2 to 3.4. What differs is told where it differs.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from surgery.errors import RecipeError
from surgery.evaluate.load import Loaded
from surgery.evaluate.score import score
from surgery.evaluate.tokens import Encoded
from surgery.recover.clusters import cluster, featurize
from surgery.recover.corpus import Corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Ints = npt.NDArray[np.int64]
    Floats = npt.NDArray[np.float64]

CONCEPTS = 5  # of a document
_WORD = re.compile(r"[^\W\d_]{3,}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What became of one cluster.

    Attributes:
        documents: how many it holds.
        degradation: mean of student minus parent, in nats a token.
        budget: how many may be chosen.
        chosen: how many are.
        conflicts: how many were passed over because they contradict the chosen ones.
    """

    documents: int
    degradation: float
    budget: int
    chosen: int
    conflicts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Documents to train on, and why.

    Attributes:
        documents: their numbers in the corpus, ascending; enough to choose them again.
        clusters: what became of each.
        share, seed: what was asked for.
    """

    documents: tuple[int, ...]
    clusters: tuple[Cluster, ...]
    share: float
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """Return a plain table that JSON holds."""
        return asdict(self)

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> "Selection":
        """Return the selection that `as_dict` told."""
        return cls(
            documents=tuple(told["documents"]),
            clusters=tuple(Cluster(**one) for one in told["clusters"]),
            share=told["share"],
            seed=told["seed"],
        )


def select(
    corpus: Corpus,
    tokenizer: "PreTrainedTokenizerBase",
    student: Loaded,
    parent: Loaded,
    *,
    share: float,
    seed: int,
    context: int,
    batch_tokens: int,
    clusters: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Selection:
    """Choose a share of the documents by how much worse the student is on their like.

    Deviations from the paper: clusters come from the tokens of the documents, not from a sentence
    encoder, which would be one more model; degradation is the difference of the losses where
    the paper has the Jensen-Shannon divergence; a document is judged by its first `context`
    tokens.

    Args:
        share: of the documents, above 0 and at most 1.
        clusters: at most so many.

    Raises:
        RecipeError: the share makes no sense, the vocabularies differ, or the student is nowhere
            worse than its parent.
        TrainError: a forward pass fails.
    """
    check_selection(share, student.vocabulary, parent.vocabulary)
    degradation = degradations(
        corpus, student, parent, context=context, batch_tokens=batch_tokens, progress=progress
    )
    documents = [corpus.tokens(number) for number in range(len(corpus))]
    labels = cluster(featurize(documents), clusters=clusters, seed=seed)
    words = [
        _WORD.findall(tokenizer.decode(ids, skip_special_tokens=True).lower()) for ids in documents
    ]
    sizes = np.minimum(np.diff(corpus.starts), context)
    return choose(degradation, labels, concepts(words), sizes, share=share, seed=seed)


def check_selection(share: float, student: int, parent: int) -> None:
    """Refuse a selection that cannot be.

    Raises:
        RecipeError: the share is outside 0 to 1, or the models predict other numbers of tokens.
    """
    if not 0 < share <= 1:
        fact = f"{share:g} of the documents is outside 0 to 1"
        raise RecipeError("--select-share", fact, "for instance 0.2")
    if student != parent:
        fact = f"compares losses, and the student has {student} tokens, the parent {parent}"
        raise RecipeError("--select paser", fact, "name a parent of the same vocabulary")


def degradations(
    corpus: Corpus,
    student: Loaded,
    parent: Loaded,
    *,
    context: int,
    batch_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> "Floats":
    """Return of each document the mean of student minus parent, in nats a token, float64 [n].

    Only tokens that would be trained on count; NaN where the first `context` have none.
    """
    encoded = [_encoded(corpus, number, context) for number in range(len(corpus))]
    found = score(
        student,
        encoded,
        names=[corpus.name(number) for number in range(len(corpus))],
        context=context,
        stride=context,
        batch_tokens=batch_tokens,
        reference=parent,
        progress=progress,
    )
    means = np.full(len(corpus), np.nan)
    for number, (one, start) in enumerate(zip(found, corpus.starts[:-1], strict=True)):
        wanted = corpus.wanted[start + 1 : start + 1 + len(one.nats)]
        if wanted.any():
            lost = one.nats.astype(np.float64) - one.of_reference().nats
            means[number] = lost[wanted].mean()
    return means


def concepts(documents: Sequence[Sequence[str]]) -> list[frozenset[str]]:
    """Return of each document the words that tell it apart: the highest TF-IDF.

    The paper takes RAKE's key phrases; phrases seldom meet again, words do.
    """
    holders = Counter(word for words in documents for word in set(words))
    found = []
    for words in documents:
        weight = {
            word: count * math.log((1 + len(documents)) / holders[word])
            for word, count in Counter(words).items()
        }
        ranked = sorted(weight, key=lambda word: (-weight[word], word))
        found.append(frozenset(ranked[:CONCEPTS]))
    return found


def choose(
    degradation: "Floats",
    labels: "Ints",
    known: Sequence[frozenset[str]],
    sizes: "Ints",
    *,
    share: float,
    seed: int,
) -> Selection:
    """Share the budget out by degradation, and take the most degraded documents that agree.

    Documents of a cluster come by degradation over log(tokens^2), what they give for what they
    cost. A graph of concepts for each cluster joins those that a chosen document holds together;
    a document with two concepts that are both known and never joined is passed over.

    Raises:
        RecipeError: the student is nowhere worse than its parent.
    """
    groups = [np.flatnonzero(labels == label) for label in range(int(labels.max()) + 1)]
    lost = np.array([_mean(degradation[group]) for group in groups])
    if not (lost > 0).any():
        fact = "the student is nowhere worse than its parent"
        raise RecipeError("--select paser", fact, "leave it out")
    whole = max(round(share * len(labels)), 1)
    room = np.array([int(np.isfinite(degradation[group]).sum()) for group in groups])
    budgets = allot(whole, np.maximum(lost, 0), room)
    efficiency = degradation / np.log(np.maximum(sizes, 2) ** 2.0)
    documents: list[int] = []
    told: list[Cluster] = []
    for group, mean, budget in zip(groups, lost, budgets.tolist(), strict=True):
        usable = group[np.isfinite(efficiency[group])]
        ranked = usable[np.argsort(-efficiency[usable], kind="stable")].tolist()
        taken, conflicts = _consistent(ranked, known, budget)
        documents += taken
        told.append(
            Cluster(
                documents=len(group),
                degradation=float(mean),
                budget=budget,
                chosen=len(taken),
                conflicts=conflicts,
            )
        )
    return Selection(
        documents=tuple(sorted(documents)), clusters=tuple(told), share=share, seed=seed
    )


def allot(whole: int, weights: "Floats", room: "Ints") -> "Ints":
    """Return whole numbers in proportion to weights, none above its room, int64 [k].

    What a full cluster cannot take goes to the others in proportion; the paper lets it go.
    """
    given = np.zeros(len(weights), np.int64)
    for _ in range(len(weights)):
        weight = np.where(given < room, weights, 0.0)
        left = whole - int(given.sum())
        if left <= 0 or not weight.any():
            break
        given = np.minimum(given + _apportioned(left, weight), room)
    return given


def _apportioned(whole: int, weights: "Floats") -> "Ints":
    exact = whole * weights / weights.sum()
    found: Ints = np.floor(exact).astype(np.int64)
    by_rest = np.argsort(found - exact, kind="stable")
    found[by_rest[: whole - int(found.sum())]] += 1
    return found


def _consistent(
    ranked: Sequence[int], known: Sequence[frozenset[str]], budget: int
) -> tuple[list[int], int]:
    joined: dict[str, set[str]] = {}
    taken: list[int] = []
    conflicts = 0
    for document in ranked:
        if len(taken) == budget:
            break
        if any(b not in joined[a] for a, b in _met(known[document], joined)):
            conflicts += 1
            continue
        taken.append(document)
        for one in known[document]:
            joined.setdefault(one, set()).update(known[document])
    return taken, conflicts


def _met(found: frozenset[str], joined: Mapping[str, set[str]]) -> Iterator[tuple[str, str]]:
    return combinations([word for word in found if word in joined], 2)


def _mean(values: "Floats") -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else 0.0


def _encoded(corpus: Corpus, number: int, context: int) -> Encoded:
    ids = corpus.tokens(number)[: context + 1].astype(np.int64)
    return Encoded(ids=ids, given=1, sink=False, size=0, unknown=0)
