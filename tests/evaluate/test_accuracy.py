"""Tests of accuracies: exact, adjusted over tasks, and intervals that cover."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from surgery.evaluate.accuracy import holm, mcnemar, mean_interval
from surgery.evaluate.tasks import Outcome, compare_tasks, numbered


@pytest.mark.parametrize(("mine", "theirs"), [(0, 0), (1, 0), (5, 5), (3, 9), (20, 4), (0, 12)])
def test_mcnemar_is_twice_the_smaller_tail_of_a_fair_coin(mine: int, theirs: int) -> None:
    count = mine + theirs
    tail = sum(comb(count, k) for k in range(min(mine, theirs) + 1)) / 2**count
    assert mcnemar(mine, theirs) == pytest.approx(min(1, 2 * tail), rel=1e-12)
    assert mcnemar(mine, theirs) == mcnemar(theirs, mine)


def test_mcnemar_of_many_documents_neither_overflows_nor_vanishes() -> None:
    assert mcnemar(5000, 5000) == 1
    assert 0 < mcnemar(4800, 5200) < 1e-4


def test_mcnemar_errs_in_at_most_five_of_a_hundred_equal_pairs() -> None:
    rng = np.random.default_rng(11)
    wins = rng.binomial(60, 0.5, 2000)
    wrong = np.mean([mcnemar(int(w), 60 - int(w)) <= 0.05 for w in wins])
    assert 0.01 < wrong <= 0.06


@pytest.mark.parametrize(
    ("values", "adjusted"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.5], [0.5]),
        ([0.9, 0.8], [1.0, 1.0]),
        ([], []),
    ],
)
def test_holm_multiplies_by_the_hypotheses_left_and_never_falls(
    values: list[float], adjusted: list[float]
) -> None:
    assert holm(values) == pytest.approx(adjusted)


def test_the_interval_of_an_accuracy_difference_covers_it_about_95_times_in_100() -> None:
    rng, covered = np.random.default_rng(3), 0
    truth = 0.15 - 0.05
    for trial in range(400):
        values = rng.choice([1.0, -1.0, 0.0], size=150, p=[0.15, 0.05, 0.8])
        low, high = mean_interval(values, draws=400, seed=trial)
        covered += low <= truth <= high
    # 0.95 within four standard errors of 400 trials.
    assert 0.90 <= covered / 400 <= 0.99


def test_too_few_documents_have_no_interval() -> None:
    assert mean_interval(np.ones(7), draws=100, seed=0) is None


def outcome(values: list[float], *, task: str = "task") -> Outcome:
    names = numbered([f"d{i}" for i in range(len(values))])
    documents = dict(zip(names, values, strict=True))
    return Outcome(
        task=task, kind="pairs", metric="acc", value=float(np.mean(values)), documents=documents
    )


def difference(mine: list[float], theirs: list[float]):
    (task,) = compare_tasks(
        {"c": [outcome(mine)], "p": [outcome(theirs)]}, ["c"], ["p"], draws=500, seed=0
    )
    return task.differences[0]


@pytest.mark.parametrize(
    ("mine", "theirs", "verdict"),
    [
        ([1.0] * 20, [1.0] * 20, "equal"),
        ([1.0] * 20, [0.0] * 10 + [1.0] * 10, "better"),
        ([0.0] * 10 + [1.0] * 10, [1.0] * 20, "worse"),
        ([1.0, 0.0] * 10, [1.0, 0.0] * 9 + [0.0, 1.0], "not distinguishable"),
        ([0.5] * 20, [0.25] * 20, "higher"),
        ([0.5] * 5, [0.25] * 5, "too few documents"),
    ],
)
def test_the_verdict_says_what_is_shown(
    mine: list[float], theirs: list[float], verdict: str
) -> None:
    assert difference(mine, theirs).verdict == verdict


def test_holm_runs_over_the_tasks_of_one_child_and_parent() -> None:
    wins = [[1.0] * 20, [0.0] * 7 + [1.0] * 13, [0.0] * 6 + [1.0] * 14]
    mine = [outcome(wins[0], task=f"t{i}") for i in range(2)]
    theirs = [outcome(values, task=f"t{i}") for i, values in enumerate(wins[1:])]
    tasks = compare_tasks({"c": mine, "p": theirs}, ["c"], ["p"], draws=200, seed=0)
    found = [task.differences[0] for task in tasks]
    assert [each.p_holm for each in found] == pytest.approx(holm([each.p for each in found]))
    assert found[0].p_holm == pytest.approx(2 * found[0].p)


def test_documents_pair_by_hash_whatever_their_order() -> None:
    mine, theirs = outcome([1.0, 0.0] * 10), outcome([1.0, 0.0] * 10)
    turned = Outcome(
        task="task",
        kind="pairs",
        metric="acc",
        value=0.5,
        documents=dict(reversed(theirs.documents.items())),
    )
    (task,) = compare_tasks({"c": [mine], "p": [turned]}, ["c"], ["p"], draws=50, seed=0)
    assert (task.differences[0].only_child, task.differences[0].only_parent) == (0, 0)


def test_a_document_that_occurs_twice_is_told_apart() -> None:
    assert numbered(["a", "b", "a", "a"]) == ["a", "b", "a#2", "a#3"]
