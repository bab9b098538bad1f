"""What a linearization cost: rows, shares of the gap, and their intervals."""

from __future__ import annotations

import json
import math

import pytest

from surgery.errors import RecipeError
from surgery.evaluate.results import Divergence, Figures, ModelFigures
from surgery.evaluate.statistics import paired_difference
from surgery.linearize.table import (
    BASELINE,
    TEACHER,
    UNTRAINED,
    as_dicts,
    from_dicts,
    tabulated,
)

BYTES = 100


def model(bits: list[float], teacher: list[float] | None = None) -> ModelFigures:
    """A model by the bits per byte of documents of 100 bytes each."""
    import numpy as np

    documents = tuple(figures(f"d{n}", one, 1) for n, one in enumerate(bits))
    overall = figures("overall", sum(bits) / len(bits), len(bits))
    if teacher is not None:
        pairs = [
            np.array([(b * BYTES * math.log(2), BYTES) for b in one]) for one in (bits, teacher)
        ]
        divergence = Divergence(
            mean=0.5, median=0.4, p95=1.0, p99=2.0, agreement=0.75, logit_rms=1.0
        )
        difference = paired_difference(*pairs, draws=200)
        overall = figures("overall", overall.bits_per_byte, len(bits), divergence, difference)
    return ModelFigures(
        name="model",
        ref="model",
        revision=None,
        parent=teacher is None,
        parameters=1,
        dtype="float32",
        mark="none",
        not_compared=None,
        overall=overall,
        domains=(),
        per_document=documents,
    )


def figures(name, bits, count, divergence=None, difference=None) -> Figures:
    size = BYTES * count
    return Figures(
        name=name,
        documents=count,
        tokens=size // 2,
        unknown=0,
        bytes=size,
        nats=bits * size * math.log(2),
        bits_per_byte=bits,
        perplexity=1.0,
        divergence=divergence,
        difference=difference,
    )


def table(documents: int = 16):
    spread = [0.01 * n for n in range(documents)]
    teacher = [1.0 + s for s in spread]

    def at(more: float) -> ModelFigures:
        return model([bits + more for bits in teacher], teacher)

    found = {TEACHER: model(teacher), BASELINE: at(0.2), UNTRAINED: at(2.0), "lora": at(0.05)}
    return {row.name: row for row in tabulated(found)}


def test_shares_are_of_the_way_from_a_start_to_the_teacher() -> None:
    rows = table()
    assert rows["lora"].closed[BASELINE].share == pytest.approx(0.75)
    assert rows["lora"].closed[UNTRAINED].share == pytest.approx(0.975)
    assert rows[UNTRAINED].closed[BASELINE].share == pytest.approx(-9.0)


def test_neither_the_teacher_nor_a_start_closes_its_own_gap() -> None:
    rows = table()
    assert rows[TEACHER].closed == {}
    assert set(rows[BASELINE].closed) == {UNTRAINED}


def test_a_difference_that_is_the_same_in_every_document_has_no_width() -> None:
    row = table()["lora"]
    assert row.low == pytest.approx(row.more)
    assert row.high == pytest.approx(0.05)
    assert row.closed[BASELINE].low == pytest.approx(0.75)


def test_few_documents_have_no_interval() -> None:
    row = table(documents=4)["lora"]
    assert (row.low, row.closed[BASELINE].high) == (None, None)
    assert row.closed[BASELINE].share == pytest.approx(0.75)


def test_where_the_start_is_no_worse_than_the_teacher_there_is_no_share() -> None:
    teacher = [1.0] * 10
    better = model([0.9] * 10, teacher)
    found = {TEACHER: model(teacher), BASELINE: better, "lora": model([1.1] * 10, teacher)}
    assert tabulated(found)[2].closed == {}


def test_rows_come_back_from_json() -> None:
    rows = tuple(table().values())
    assert from_dicts(json.loads(json.dumps(as_dicts(rows)))) == rows


@pytest.mark.parametrize("told", [[{"name": "x"}], [{"closed": 3}], [{"closed": {"a": {}}}], [1]])
def test_what_is_no_table_is_refused(told) -> None:
    with pytest.raises(RecipeError, match="is none of a linearization"):
        from_dicts(told)
