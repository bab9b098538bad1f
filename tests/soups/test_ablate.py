"""Averages of all subsets: the same figures as of soups that are written one by one."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cli.main import main
from surgery.soups.ablate import count_subsets, wanted_sizes

NEAR = 5e-5  # a mean of three lies between two bfloat16 now and then, and is rounded either way
PARTS = ("uni", "arith", "v2")


@pytest.fixture(scope="module")
def table(models, texts, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("ablate") / "table.json"
    words = [word for text in texts for word in ("--text", text)]
    words += ["--base", models["base"], "-o", str(out)]
    assert main(["ablate", *(models[name] for name in PARTS), *words]) == 0
    return json.loads(out.read_text())


def figures(row: dict) -> list[float]:
    return [figure["bits_per_byte"] for figure in (row["overall"], *row["texts"])]


def test_every_subset_has_a_row_and_the_base(table: dict) -> None:
    members = {tuple(row["parts"]) for row in table["subsets"]}
    assert len(members) == len(table["subsets"]) == 8
    assert members >= {(), ("uni",), ("uni", "v2"), ("arith", "v2"), PARTS}


@pytest.mark.parametrize(
    "parts", [(), ("uni",), ("v2",), ("uni", "arith"), ("arith", "v2"), ("uni", "v2"), PARTS]
)
def test_figures_are_those_of_written_soups(table: dict, bits, parts: tuple[str, ...]) -> None:
    row = next(row for row in table["subsets"] if tuple(row["parts"]) == parts)
    near = NEAR if len(parts) > 2 else 1e-9  # halves are exact
    np.testing.assert_allclose(figures(row), bits(*(parts or ("base",))), rtol=0, atol=near)


def test_changes_are_from_the_full_average(table: dict) -> None:
    full = next(row for row in table["subsets"] if tuple(row["parts"]) == PARTS)
    assert table["reference"] == list(PARTS)
    assert full["overall"]["change"]["verdict"] == "equal"
    for row in table["subsets"]:
        for mine, other in zip(
            (row["overall"], *row["texts"]), (full["overall"], *full["texts"]), strict=True
        ):
            change = mine["change"]
            apart = mine["bits_per_byte"] - other["bits_per_byte"]
            assert change["figure"] == pytest.approx(apart)
            assert change["low"] <= change["figure"] <= change["high"]


def test_rows_stand_from_the_best_to_the_worst(table: dict) -> None:
    found = [row["overall"]["bits_per_byte"] for row in table["subsets"]]
    assert found == sorted(found)


@pytest.mark.parametrize(("against", "verdicts"), [("best", {"equal", "worse"}), ("base", None)])
def test_changes_are_from_what_was_asked(models, texts, capsys, against, verdicts) -> None:
    words = ["--text", texts[0], "--against", against, "--sizes", "1", "--json"]
    words += ["--base", models["base"]]
    assert main(["ablate", models["uni"], models["arith"], *words]) == 0
    found = json.loads(capsys.readouterr().out)
    changes = {tuple(row["parts"]): row["overall"]["change"] for row in found["subsets"]}
    assert changes[tuple(found["reference"])]["figure"] == 0
    assert found["reference"] == (["uni"] if against == "best" else [])
    if verdicts:
        assert {c["verdict"] for c in changes.values()} == verdicts


def test_parts_that_find_no_room_give_the_same(models, texts, capsys) -> None:
    found = []
    for memory in ("1M", "1G"):  # a part holds 1.9 MB
        words = ["--text", texts[1], "--memory", memory, "--sizes", "2-3", "--json"]
        assert main(["ablate", *(models[name] for name in PARTS), *words]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    assert sorted(len(row["parts"]) for row in found[0]["subsets"]) == [2, 2, 2, 3]


@pytest.mark.parametrize(
    ("parts", "sizes", "against", "kept", "count"),
    [
        (3, None, "full", {1, 2, 3}, 7),
        (10, None, "best", set(range(1, 11)), 1023),
        (4, {1}, "full", {1, 4}, 5),
        (4, {2}, "best", {2}, 6),
    ],
)
def test_sizes_decide_how_many_are_measured(parts, sizes, against, kept, count) -> None:
    assert wanted_sizes(parts, sizes, against=against) == kept
    assert count_subsets(parts, kept) == count


def test_a_dry_run_counts(models, texts, capsys) -> None:
    words = ["--text", texts[0], "--dry-run", "--json"]
    assert main(["ablate", *models.values(), *words]) == 0
    assert json.loads(capsys.readouterr().out)["evaluations"] == 15
