"""Tables in another order: which rows are read, how often, and what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from surgery.checkpoint import TensorInfo, View, read_rows
from surgery.errors import CheckpointError
from surgery.vocabulary import RowMap, permuted
from surgery.vocabulary.permute import gather
from surgery.vocabulary.rows import AVERAGE, MEAN, ZERO, row_maps

ROWS, WIDTH = 100, 4


class Disk:
    """Stored tables, and every read of them."""

    def __init__(self, *tables: torch.Tensor) -> None:
        self.tables = tables
        self.reads: list[tuple[str, int, int]] = []

    def info(self, number: int) -> TensorInfo:
        table = self.tables[number]
        code = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}[table.dtype]
        size = table.numel() * table.element_size()
        return TensorInfo(str(number), code, tuple(table.shape), Path(f"/{number}"), 0, size)

    def read(self, tensor: TensorInfo, start: int, count: int) -> torch.Tensor:
        self.reads.append((tensor.name, start, count))
        return self.tables[int(tensor.name)][start : start + count].clone()


def table(seed: int, dtype: torch.dtype = torch.float32, rows: int = ROWS) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def row_map(pick: Any, row: Any, own: Any = None) -> RowMap:
    pick, row = np.asarray(pick, np.int64), np.asarray(row, np.int64)
    own = np.full((2, len(pick)), -1, np.int64) if own is None else np.asarray(own, np.int64)
    return RowMap(number=0, pick=pick, row=row, own=own)


@pytest.mark.parametrize(
    ("rows", "reads"),
    [
        ([3, 4, 5, 6], [(3, 4)]),
        ([6, 5, 4, 3], [(3, 4)]),
        ([9, 1, 2, 8, 50], [(1, 2), (8, 2), (50, 1)]),
        ([7, 7, 8, 7], [(7, 2)]),
        ([99, 0], [(0, 1), (99, 1)]),
    ],
)
def test_each_run_of_rows_is_read_once(rows: list[int], reads: list[tuple[int, int]]) -> None:
    disk = Disk(table(0))
    found = gather(disk.read, disk.info(0), np.array(rows))
    assert torch.equal(found, disk.tables[0][rows])
    assert [read[1:] for read in disk.reads] == reads


def test_an_unchanged_table_is_no_view() -> None:
    disk = Disk(table(0))
    same = row_map([0] * ROWS, range(ROWS))
    assert permuted(disk.info(0), same, {0: disk.info(0)}) is not None
    assert not isinstance(permuted(disk.info(0), same, {0: disk.info(0)}), View)


def test_no_more_rows_are_held_than_are_asked_for() -> None:
    disk = Disk(table(0))
    order = np.random.default_rng(0).permutation(ROWS)
    view = permuted(disk.info(0), row_map([0] * ROWS, order), {0: disk.info(0)})
    found = [read_rows(disk.read, view, start, 10) for start in range(0, ROWS, 10)]
    assert torch.equal(torch.cat(found), disk.tables[0][order])
    assert max(count for _, _, count in disk.reads) <= 10
    assert sum(count for _, _, count in disk.reads) == ROWS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [1, 3, 7])
def test_rows_do_not_depend_on_how_they_are_grouped(dtype: torch.dtype, step: int) -> None:
    disk = Disk(table(0, dtype), table(1, dtype))
    rng = np.random.default_rng(5)
    pick = rng.choice([0, 1, AVERAGE, ZERO, MEAN], ROWS)
    own = rng.integers(0, ROWS, (2, ROWS))
    view = permuted(
        disk.info(0),
        row_map(pick, np.where(pick == 1, own[1], own[0]), own),
        {0: disk.info(0), 1: disk.info(1)},
    )
    whole = read_rows(disk.read, view, 0, ROWS).double()
    starts = range(0, ROWS, step)
    parts = [read_rows(disk.read, view, s, min(step, ROWS - s)).double() for s in starts]
    assert torch.equal(torch.cat(parts), whole)
    a, b = (t.double() for t in disk.tables)
    expected = {0: a[own[0]], 1: b[own[1]], AVERAGE: (a[own[0]] + b[own[1]]) / 2}
    expected |= {ZERO: torch.zeros(ROWS, WIDTH), MEAN: a.mean(0).expand(ROWS, WIDTH)}
    for number, rows in expected.items():
        at = pick == number
        torch.testing.assert_close(whole[at], rows[at].double(), rtol=1e-6, atol=1e-7)


def test_the_average_of_equal_rows_is_that_row() -> None:
    one = table(3)
    disk = Disk(one, one, one)
    own = np.stack([np.full(ROWS, -1), *[np.arange(ROWS)] * 2])
    full = row_map([AVERAGE] * ROWS, [-1] * ROWS, own)
    view = permuted(disk.info(0), full, {n: disk.info(n) for n in range(3)})
    assert torch.equal(read_rows(disk.read, view, 0, ROWS).float(), one)


def test_only_tables_that_rows_come_from_are_stored_ones_of_the_view() -> None:
    disk = Disk(table(0), table(1), table(2))
    view = permuted(
        disk.info(0), row_map([0, 2], [1, 1]), {number: disk.info(number) for number in range(3)}
    )
    assert isinstance(view, View)
    assert [part.name for part in view.stored] == ["0", "2"]
    assert view.shape == (2, WIDTH)


def test_two_maps_have_two_keys() -> None:
    disk = Disk(table(0))
    views = [
        permuted(disk.info(0), row_map([0, 0], rows), {0: disk.info(0)})
        for rows in ([1, 2], [2, 1])
    ]
    assert views[0].key != views[1].key  # type: ignore[union-attr]


def test_a_view_of_a_view_is_permuted() -> None:
    disk = Disk(table(0))
    back = np.arange(ROWS)[::-1]
    once = permuted(disk.info(0), row_map([0] * ROWS, back), {0: disk.info(0)})

    def read(tensor: TensorInfo, start: int, count: int) -> torch.Tensor:
        return read_rows(disk.read, tensor, start, count)

    twice = permuted(once, row_map([0] * ROWS, back), {0: once})
    assert torch.equal(read_rows(read, twice, 0, ROWS), disk.tables[0])


def test_integers_are_not_moved() -> None:
    disk = Disk(torch.zeros(ROWS, WIDTH, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match="stored as U8"):
        permuted(disk.info(0), row_map([0, 0], [1, 2]), {0: disk.info(0)})


def test_rules_for_a_token_that_a_model_lacks() -> None:
    own = np.array([[0, -1, -1, -1], [5, 6, 7, -1], [8, 9, -1, -1]])
    with_base, without = row_maps(own, 0), row_maps(own, None)
    assert with_base[1].pick.tolist() == [1, 1, 1, MEAN]
    assert with_base[0].pick.tolist() == [0, AVERAGE, 1, MEAN]
    assert with_base[2].pick.tolist() == [2, 2, 1, MEAN]
    assert without[0].row.tolist() == [0, -1, 7, -1]
    own[0, 2] = 3
    assert row_maps(own, 0)[2].pick.tolist() == [2, 2, 0, MEAN]
    assert row_maps(own, None)[2].pick.tolist() == [2, 2, AVERAGE, MEAN]
