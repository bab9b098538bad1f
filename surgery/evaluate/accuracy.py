"""Accuracies of two models on the same documents: exact tests, and intervals."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from surgery.evaluate.statistics import FEWEST_DOCUMENTS, resampled_sums

Floats = npt.NDArray[np.float64]


def mcnemar(only_child: int, only_parent: int) -> float:
    """Return the exact two-sided p-value that two models are right equally often.

    Args:
        only_child: documents that the child alone gets right.
        only_parent: documents that the parent alone gets right.

    The two counts are tested against a fair coin; documents on which both agree say nothing.

    Source: McNemar, "Note on the sampling error of the difference between correlated
    proportions or percentages", 1947, in its exact binomial form; doubled one-sided tail, at
    most 1.
    """
    count, fewer = only_child + only_parent, min(only_child, only_parent)
    term = tail = 1
    for chosen in range(fewer):
        term = term * (count - chosen) // (chosen + 1)
        tail += term
    return min(1.0, 2 * tail / (1 << count))


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for testing all of them, in the same order.

    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = highest
    return adjusted


def mean_interval(values: Floats, *, draws: int, seed: int) -> tuple[float, float] | None:
    """Return the 95% interval of a mean over documents, by a percentile bootstrap.

    Shapes: values is [documents]. None where there are too few documents for one.
    """
    if len(values) < FEWEST_DOCUMENTS:
        return None
    sums = np.concatenate(resampled_sums(values[:, None], draws=draws, seed=seed))
    low, high = np.quantile(sums[:, 0] / len(values), [0.025, 0.975])
    return float(low), float(high)
