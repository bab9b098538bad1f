"""The k largest elements are found exactly, whatever the vector, its parts and the sample."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest

from merges.stages import bracket, selection
from merges.stages.selection import largest, largest_of_all, order_statistics, quantiles
from streams import drive, parts_of

N = 5003


def vectors() -> Iterator[tuple[str, Any]]:
    draw = np.random.default_rng(7)
    normal = draw.standard_normal(N)
    yield "normal", np.abs(normal)
    yield "signed", normal
    yield "equal", np.full(N, 0.5)
    yield "zeros", np.zeros(N)
    yield "few", draw.integers(0, 4, N) / 4
    yield "mostly zero", np.where(draw.random(N) < 0.9, 0, normal)
    yield "one value and zeros", (draw.random(N) < 0.3) * 0.25
    yield "ascending", np.arange(N) / N
    yield "bf16", np.abs((normal * 64).round() / 64)
    yield "tiny", normal * 1e-40
    yield "huge", normal * 1e37
    big = np.abs(normal)
    big[1000:1040] *= 100
    yield "one row far larger", big
    yield "one outlier", np.concatenate([normal[1:], [1e9]])


def kept(values: Any, k: int) -> Any:
    """Sort everything: the larger value first, then the lower index."""
    order = np.lexsort((np.arange(len(values)), -values))
    mask = np.zeros(len(values), bool)
    mask[order[:k]] = True
    return mask


def masks(cut: Any, values: Any, size: int) -> Any:
    whole = parts_of(len(values), size)
    found = [cut.keep(values[p.start : p.start + p.count], p) for p in whole]
    return np.concatenate(found) if found else np.zeros(0, bool)


def given(x: Any) -> list[Any]:
    return [m.numpy() for m in x.models]


@pytest.mark.parametrize("name", [name for name, _ in vectors()])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_kept_is_what_a_stable_sort_puts_first(name: str, dtype: str) -> None:
    values = dict(vectors())[name].astype(dtype)
    counts = [0, 1, 2, 50, N // 5, N // 2, N - 50, N - 1, N]
    for part, sample in product((17, 512, 2 * N), (128, 512, 2 * N)):
        ((row,),), _ = drive([largest(given, [counts], N)], [[values]], part=part, sample=sample)
        for k, cut in zip(counts, row, strict=True):
            assert np.array_equal(masks(cut, values, part), kept(values, k)), (k, part, sample)


@pytest.mark.parametrize("total", [0, 1, 2])
def test_the_shortest_vectors_are_cut_too(total: int) -> None:
    values = np.ones(total)
    for k in range(total + 1):
        (((cut,),),), _ = drive([largest(given, [[k]], total)], [[values]], part=4)
        assert np.array_equal(masks(cut, values, 4), kept(values, k))


def test_keeping_all_or_nothing_reads_nothing() -> None:
    found = largest(given, [[0, N], [N]], N)
    with pytest.raises(StopIteration):
        next(found)


def test_only_vectors_with_cuts_are_looked_at() -> None:
    values = [np.arange(9.0), np.arange(9.0)[::-1].copy()]
    ((cuts,), _) = drive([largest(given, [[], [2]], 9)], [values], part=4)
    assert cuts[0] == []
    assert masks(cuts[1][0], values[1], 4).tolist() == [True] * 2 + [False] * 7


def test_one_reading_is_enough_for_rows_of_one_size() -> None:
    values = np.abs(np.random.default_rng(3).standard_normal(1 << 18)).astype("float32")
    _, readings = drive(
        [largest(given, [[1 << 10, 1 << 16, 1 << 17]], 1 << 18)],
        [[values]],
        part=1 << 14,
        sample=1 << 14,
    )
    assert readings == 1


def test_heavy_ties_are_counted_and_not_collected() -> None:
    draw = np.random.default_rng(5)
    values = draw.integers(0, 8, 1 << 16).astype("float32")
    sample = bracket.single_sample(values[::16].copy(), values.size, limit=selection.LIMIT)
    for rank in (1, 100, 1 << 14, 1 << 15, values.size - 1):
        found = bracket.count(values, sample.guess(rank))
        assert found.inside.size == 0


@pytest.mark.parametrize("name", [name for name, _ in vectors()])
def test_what_would_hold_too_much_is_narrowed_by_counting(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "LIMIT", 20)
    values = dict(vectors())[name].astype("float32")
    for k in (1, 700, N // 2, N - 1):
        (((cut,),),), readings = drive([largest(given, [[k]], N)], [[values]], part=600, sample=256)
        assert np.array_equal(masks(cut, values, 600), kept(values, k))
        assert readings <= 7


@pytest.mark.parametrize("told", [0.0, 1e9, -1e9])
def test_a_misleading_sample_costs_readings_and_no_exactness(told: float) -> None:
    values = np.arange(4000.0)
    values[::4] = 0
    for k in (1, 100, 3500):
        wrong = np.full(4000, told)
        drawn = bracket.single_sample(wrong[:128], 4000, limit=100)
        cuts, readings = drive(
            [selection._search(given, {0: (0, k)}, 4000, {0: drawn}, selection._meet_nobody)],
            [[values]],
            part=100,
        )
        assert np.array_equal(masks(cuts[0][0], values, 100), kept(values, k))
        assert readings <= 10


def test_nan_is_kept_by_no_cut_and_hangs_none() -> None:
    values = np.arange(3000.0)
    values[::7] = np.nan
    for k in (1, 2000, 2999):
        (((cut,),),), _ = drive([largest(given, [[k]], 3000)], [[values]], part=64, sample=128)
        mask = masks(cut, values, 64)
        known = np.flatnonzero(~np.isnan(values))
        assert np.array_equal(np.flatnonzero(mask), known[-min(k, known.size) :])


@pytest.mark.parametrize("sample", [128, 4000])
def test_of_nothing_but_nan_nothing_is_kept(sample: int) -> None:
    values = np.full(3000, np.nan)
    (((cut,),),), _ = drive([largest(given, [[5]], 3000)], [[values]], part=64, sample=sample)
    assert not masks(cut, values, 64).any()


@pytest.mark.parametrize("part", [64, 1000])
@pytest.mark.parametrize("limit", [30, 1 << 20])
def test_a_model_is_cut_as_if_its_tensors_were_one_vector(
    part: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "LIMIT_OF_ALL", limit)
    for name, values in vectors():
        tensors = np.split(values, [1, 7, 2000, 2001])
        for share in (1e-9, 0.2, 0.5, 1.0):
            asked = [largest_of_all(given, [[share]], t.size, group="g") for t in tensors]
            cuts, _ = drive(asked, [[t] for t in tensors], part=part, sample=256)
            mask = np.concatenate(
                [masks(c[0][0], t, part) for c, t in zip(cuts, tensors, strict=True)]
            )
            expected = kept(values, max(int(share * N), 1))
            assert np.array_equal(mask, expected), (name, share)


def test_shares_that_differ_between_tensors_add_up() -> None:
    tensors = [np.arange(10.0), np.arange(100.0)]
    shares = (1.0, 0.05)
    asked = [
        largest_of_all(given, [[share]], t.size, group="g")
        for share, t in zip(shares, tensors, strict=True)
    ]
    cuts, _ = drive(asked, [[t] for t in tensors], part=16)
    assert sum(masks(c[0][0], t, 16).sum() for c, t in zip(cuts, tensors, strict=True)) == 15


@pytest.mark.parametrize("name", [name for name, _ in vectors()])
def test_quantiles_are_those_of_numpy(name: str) -> None:
    values = dict(vectors())[name]
    points = [0.0, 0.25, 0.5, 0.75, 1.0]
    ((row,),), _ = drive([quantiles(given, [points], N)], [[values]], part=300, sample=512)
    assert np.allclose(row, np.quantile(values, points), rtol=1e-12, atol=0)


def test_order_statistics_are_those_of_a_sort() -> None:
    values = dict(vectors())["bf16"]
    ranks = [0, 1, 2500, N - 2, N - 1]
    ((row,),), _ = drive([order_statistics(given, [ranks], N)], [[values]], part=300, sample=512)
    assert row == np.sort(values)[ranks].tolist()
