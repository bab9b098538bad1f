"""Paired intervals: they cover, they are reproducible, and they say when nothing is shown."""

from __future__ import annotations

import math

import numpy as np
import pytest

from surgery.evaluate.statistics import FEWEST_DOCUMENTS, bits_per_byte, paired_difference


def simulated(rng: np.random.Generator, *, count: int, shift: float) -> tuple[np.ndarray, ...]:
    """Documents of uneven length whose difficulty both models share; shift in bits per byte."""
    size = rng.integers(50, 1500, count).astype(float)
    hard = rng.normal(2.0, 0.4, count)
    rates = [hard + rng.normal(0, 0.02, count), hard + shift + rng.normal(0, 0.02, count)]
    return tuple(np.stack([rate * size * math.log(2), size], axis=1) for rate in rates)


def test_bits_per_byte_of_a_fair_coin_a_byte_is_one() -> None:
    assert bits_per_byte(800 * math.log(2), 800) == pytest.approx(1.0)


def test_the_interval_covers_the_truth_about_95_times_in_100() -> None:
    rng, covered = np.random.default_rng(7), 0
    for trial in range(400):
        parent, child = simulated(rng, count=40, shift=0.1)
        found = paired_difference(child, parent, draws=400, seed=trial)
        covered += found.low <= 0.1 <= found.high
    # 0.95 within four standard errors of 400 trials, and the known narrowness at 40 documents.
    assert 0.90 <= covered / 400 <= 0.98


def test_pairing_sees_what_unpaired_spread_would_hide() -> None:
    parent, child = simulated(np.random.default_rng(1), count=60, shift=0.05)
    found = paired_difference(child, parent)
    spread = np.std(parent[:, 0] / (parent[:, 1] * math.log(2))) / math.sqrt(60)
    assert found.high - found.low < spread
    assert found.verdict == "worse"


@pytest.mark.parametrize(
    ("shift", "verdict"), [(-0.1, "better"), (0.1, "worse"), (0.0, "not distinguishable")]
)
def test_the_verdict_follows_the_interval(shift: float, verdict: str) -> None:
    parent, child = simulated(np.random.default_rng(3), count=50, shift=shift)
    assert paired_difference(child, parent).verdict == verdict


def test_the_difference_is_one_of_ratios_of_sums() -> None:
    child, parent = np.array([[10.0, 1], [10, 9]]), np.array([[10.0, 5], [10, 5]])
    expected = bits_per_byte(20, 10) - bits_per_byte(20, 10)
    assert paired_difference(child, parent).bits_per_byte == pytest.approx(expected)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    parent, child = simulated(np.random.default_rng(5), count=30, shift=0.1)
    first, again, other = (paired_difference(child, parent, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_draws_do_not_depend_on_how_they_are_cut_into_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parent, child = simulated(np.random.default_rng(5), count=31, shift=0.1)
    whole = paired_difference(child, parent)
    monkeypatch.setattr("surgery.evaluate.statistics._BLOCK", 31 * 8)
    assert paired_difference(child, parent) == whole


def test_too_few_documents_get_no_interval() -> None:
    parent, child = simulated(np.random.default_rng(5), count=FEWEST_DOCUMENTS, shift=0.1)
    assert paired_difference(child, parent).low is not None
    found = paired_difference(child[1:], parent[1:])
    assert (found.low, found.high, found.verdict) == (None, None, "too few documents")
    assert found.bits_per_byte > 0


def test_documents_without_a_scored_byte_do_not_break_the_interval() -> None:
    parent, child = simulated(np.random.default_rng(5), count=20, shift=0.1)
    empty = np.zeros((5, 2))
    found = paired_difference(np.concatenate([child, empty]), np.concatenate([parent, empty]))
    plain = paired_difference(child, parent)
    assert (found.low, found.high) == (plain.low, plain.high)


def test_a_model_against_itself_is_equal() -> None:
    parent, _ = simulated(np.random.default_rng(5), count=20, shift=0.1)
    found = paired_difference(parent, parent)
    assert (found.bits_per_byte, found.low, found.high) == (0, 0, 0)
    assert found.verdict == "equal"
