"""What models score on tasks, document by document, and which differences are shown by it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from surgery.evaluate.accuracy import holm, mcnemar, mean_interval

LEVEL = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One model on one task.

    Attributes:
        task: The task, by its name.
        kind: "pairs", or "harness".
        metric: What the values are, such as "acc".
        value: Their mean, or the harness's own aggregate.
        documents: The value of each document by its hash; empty where there is none.
        metrics: Every figure that the harness gives.
    """

    task: str
    kind: str
    metric: str
    value: float
    documents: dict[str, float]
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFigures:
    """One model on one task: its outcome, and the 95% interval of its mean over documents."""

    model: str
    value: float
    low: float | None
    high: float | None
    metrics: dict[str, float]
    documents: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDifference:
    """A child beside a parent on one task, over the documents that both have.

    Attributes:
        child, parent: What the user typed for them.
        documents: How many are paired.
        difference: Mean of the child's values minus the parent's.
        low, high: 95% interval of it, by a bootstrap over documents; None for too few.
        only_child, only_parent: Documents that one alone gets right; None where values are not
            right or wrong.
        p: Of the exact McNemar test, or None, likewise.
        p_holm: The same, adjusted for all tasks of this child and parent.
        verdict: "better" or "worse" by the adjusted p at 0.05, else "not distinguishable", or
            "equal" where no document is told apart. Values that are not right or wrong are
            judged by the interval, as "higher" or "lower", or "too few documents".
    """

    child: str
    parent: str
    documents: int
    difference: float
    low: float | None
    high: float | None
    only_child: int | None
    only_parent: int | None
    p: float | None
    p_holm: float | None
    verdict: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task: every model on it, and every child beside every parent."""

    name: str
    kind: str
    metric: str
    models: tuple[TaskFigures, ...]
    differences: tuple[TaskDifference, ...]


def compare_tasks(
    outcomes: Mapping[str, Sequence[Outcome]],
    children: Sequence[str],
    parents: Sequence[str],
    *,
    draws: int,
    seed: int,
) -> tuple[Task, ...]:
    """Return each task with its models and differences.

    Args:
        outcomes: by model, its tasks in one and the same order.
    """
    couples = [(child, parent) for child in children for parent in parents]
    judged = [
        _judged(child, parent, outcomes[child], outcomes[parent], draws=draws, seed=seed)
        for child, parent in couples
    ]
    first = next(iter(outcomes.values()))
    return tuple(
        Task(
            name=outcome.task,
            kind=outcome.kind,
            metric=outcome.metric,
            models=tuple(
                _figures(model, found[place], draws=draws, seed=seed)
                for model, found in outcomes.items()
            ),
            differences=tuple(d for column in judged if (d := column[place]) is not None),
        )
        for place, outcome in enumerate(first)
    )


def numbered(hashes: Sequence[str]) -> list[str]:
    """Return hashes that are told apart where a document occurs again."""
    seen: Counter[str] = Counter()
    names = []
    for each in hashes:
        seen[each] += 1
        names.append(each if seen[each] == 1 else f"{each}#{seen[each]}")
    return names


def _figures(model: str, found: Outcome, *, draws: int, seed: int) -> TaskFigures:
    values = np.array(list(found.documents.values()), dtype=np.float64)
    low, high = mean_interval(values, draws=draws, seed=seed) or (None, None)
    return TaskFigures(
        model=model,
        value=found.value,
        low=low,
        high=high,
        metrics=found.metrics,
        documents=found.documents,
    )


def _judged(
    child: str,
    parent: str,
    mine: Sequence[Outcome],
    theirs: Sequence[Outcome],
    *,
    draws: int,
    seed: int,
) -> list[TaskDifference | None]:
    """Compare all tasks of two models; the p-values are adjusted over those that have one."""
    found = [
        _difference(child, parent, a.documents, b.documents, draws=draws, seed=seed)
        for a, b in zip(mine, theirs, strict=True)
    ]
    tested = [i for i, each in enumerate(found) if each is not None and each.p is not None]
    adjusted = holm([p for i in tested if (d := found[i]) and (p := d.p) is not None])
    for place, p in zip(tested, adjusted, strict=True):
        each = found[place]
        if each is not None:
            found[place] = replace(each, p_holm=p, verdict=_exact_verdict(each, p))
    return found


def _difference(
    child: str,
    parent: str,
    mine: Mapping[str, float],
    theirs: Mapping[str, float],
    *,
    draws: int,
    seed: int,
) -> TaskDifference | None:
    shared = [name for name in mine if name in theirs]
    if not shared:
        return None
    a, b = (np.array([side[name] for name in shared], dtype=np.float64) for side in (mine, theirs))
    low, high = mean_interval(a - b, draws=draws, seed=seed) or (None, None)
    counts: tuple[int, int] | None = None
    if np.isin(np.concatenate([a, b]), (0, 1)).all():
        counts = int((a > b).sum()), int((b > a).sum())
    return TaskDifference(
        child=child,
        parent=parent,
        documents=len(shared),
        difference=float((a - b).mean()),
        low=low,
        high=high,
        only_child=counts[0] if counts else None,
        only_parent=counts[1] if counts else None,
        p=mcnemar(*counts) if counts else None,
        p_holm=None,
        verdict=_verdict(low, high),
    )


def _verdict(low: float | None, high: float | None) -> str:
    """Judge by the interval alone: which direction is good is for the metric to say."""
    if low is None or high is None:
        return "too few documents"
    if low == high == 0:
        return "equal"
    if low <= 0 <= high:
        return "not distinguishable"
    return "higher" if low > 0 else "lower"


def _exact_verdict(found: TaskDifference, p: float) -> str:
    if not found.only_child and not found.only_parent:
        return "equal"
    if p > LEVEL:
        return "not distinguishable"
    return "better" if found.difference > 0 else "worse"
