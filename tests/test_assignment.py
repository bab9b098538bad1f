"""The linear assignment problem, against all permutations and by what must hold."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from surgery.assignment import assign


def _sum(gains, order):
    return float(gains[np.arange(len(gains)), order].sum())


def _best(gains):
    n = len(gains)
    return max(_sum(gains, np.array(order, int)) for order in itertools.permutations(range(n)))


FEW = st.integers(0, 6).flatmap(
    lambda n: arrays(np.float64, (n, n), elements=st.sampled_from([-2.0, 0.0, 0.5, 1.0, 3.0]))
)
ANY = st.integers(1, 6).flatmap(
    lambda n: arrays(np.float64, (n, n), elements=st.floats(-1e6, 1e6, width=32))
)


@settings(max_examples=150, deadline=None)
@given(FEW | ANY)
def test_no_permutation_gains_more(gains):
    order = assign(gains)
    assert sorted(order) == list(range(len(gains)))
    assert _sum(gains, order) == pytest.approx(_best(gains), rel=1e-9, abs=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 2, 50, 300])
def test_a_hidden_permutation_is_found(n, dtype):
    rng = np.random.default_rng(n)
    hidden = rng.permutation(n)
    rows = rng.normal(size=(n, 64))
    gains = (rows @ rows[hidden].T + 0.1 * rng.normal(size=(n, n))).astype(dtype)
    assert np.array_equal(hidden[assign(gains)], np.arange(n))


@pytest.mark.parametrize("seed", range(4))
def test_offsets_of_rows_and_columns_change_nothing(seed):
    rng = np.random.default_rng(seed)
    gains = rng.normal(size=(60, 60))
    moved = gains + rng.normal(size=(60, 1)) * 5 + rng.normal(size=(1, 60)) * 5
    assert np.array_equal(assign(gains), assign(moved))


@pytest.mark.parametrize("seed", range(4))
def test_shuffled_rows_and_columns_are_matched_alike(seed):
    rng = np.random.default_rng(seed)
    gains, rows, columns = rng.normal(size=(60, 60)), rng.permutation(60), rng.permutation(60)
    assert np.array_equal(columns[assign(gains[np.ix_(rows, columns)])], assign(gains)[rows])


def test_a_matching_is_certified_by_prices():
    """Every row likes its own column best at some prices: found here by Bellman and Ford."""
    gains = np.random.default_rng(7).normal(size=(80, 80))
    order = assign(gains)
    own = gains[np.arange(80), order]
    # envy[i, k]: what row i would gain in the column of row k; no cycle of envy may be positive.
    envy = gains[:, order] - own[:, None]
    paid = np.zeros(80)
    for _ in range(81):
        before, paid = paid, np.maximum(paid, (envy + paid[:, None]).max(axis=0))
    assert np.allclose(before, paid)


def test_equal_gains_keep_the_diagonal():
    assert np.array_equal(assign(np.ones((40, 40))), np.arange(40))


@pytest.mark.parametrize("gains", [np.ones((2, 3)), np.array([[1.0, np.nan], [0.0, 1.0]])])
def test_what_is_not_square_or_not_finite_is_refused(gains):
    with pytest.raises(ValueError, match="square matrix of finite"):
        assign(gains)


def test_many_equal_gains_take_no_longer():
    gains = np.random.default_rng(8).integers(0, 10, (1024, 1024)).astype(float)
    assert _sum(gains, assign(gains)) == 9 * 1024
