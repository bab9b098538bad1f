"""The greedy soup on trained models: what is kept, why, and what is written."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from cli.main import main
from surgery.soups.measure import Result

NAMES = ("base", "uni", "arith", "v2")
NEAR = 5e-5  # a mean of three lies between two bfloat16 now and then, and is rounded either way


@pytest.fixture(scope="module")
def soup(models, texts, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("greedy") / "out"
    words = [word for text in texts for word in ("--text", text)]
    assert main(["soup", *models.values(), "--greedy", *words, "-o", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def record(soup: Path) -> dict:
    return json.loads((soup / "surgery.json").read_text())


def by_hand(bits) -> tuple[list[str], list[str], list[float]]:
    """The rule, over soups that are written and evaluated one by one."""
    order = sorted(NAMES, key=lambda name: bits(name)[0])
    kept, best, figures = [order[0]], bits(order[0])[0], [bits(order[0])[0]]
    for name in order[1:]:
        figures.append(bits(*kept, name)[0])
        if figures[-1] < best:
            kept, best = [*kept, name], figures[-1]
    return order, kept, figures


def test_it_keeps_what_the_rule_keeps_by_hand(record: dict, bits) -> None:
    order, kept, figures = by_hand(bits)
    decisions = record["facts"]["greedy"]["decisions"]
    assert [d["name"] for d in decisions] == order
    assert [d["name"] for d in decisions if d["added"]] == kept
    assert 1 < len(kept) < len(order)  # something was added, something was not
    np.testing.assert_allclose([d["soup"] for d in decisions], figures, atol=NEAR)
    np.testing.assert_allclose([d["alone"] for d in decisions], [bits(n)[0] for n in order])


def test_the_output_is_the_uniform_soup_of_the_kept(record, soup, texts, bits) -> None:
    from surgery.evaluate import evaluate

    _, kept, _ = by_hand(bits)
    assert record["parameters"]["models"] == kept
    assert len(record["inputs"]) == len(kept)
    last = [d for d in record["facts"]["greedy"]["decisions"] if d["added"]][-1]
    found = evaluate([soup], texts, bootstrap=1).models[0].overall
    assert found.bits_per_byte == pytest.approx(last["soup"], abs=NEAR)


def test_every_later_decision_has_its_interval(record: dict) -> None:
    first, *later = record["facts"]["greedy"]["decisions"]
    assert first["change"] is None
    before = first["soup"]
    for each in later:
        change = each["change"]
        assert change["low"] <= change["figure"] <= change["high"]
        assert change["figure"] == pytest.approx(each["soup"] - before)
        assert each["added"] == (change["figure"] < 0)
        before = each["soup"] if each["added"] else before


def test_it_is_reproduced_without_text(soup: Path, capsys) -> None:
    assert main(["reproduce", str(soup)]) == 0


def test_the_record_names_texts_by_digest_and_no_path(record: dict, texts: list[str]) -> None:
    told = record["facts"]["greedy"]
    digests = {Path(t).name: sha256(Path(t).read_bytes()).hexdigest() for t in texts}
    assert told["held_out"] == digests
    assert str(Path(texts[0]).parent) not in json.dumps(told)


def test_equal_is_not_better() -> None:
    one = Result(values=np.array([[2.0, 1.0], [3.0, 1.0]]), lower=True)
    accuracy = Result(values=np.array([[1.0, 1.0], [0.0, 1.0]]), lower=False)
    assert not one.beats(one)
    assert not accuracy.beats(accuracy)


@pytest.mark.parametrize(("lower", "wins"), [(True, False), (False, True)])
def test_less_is_better_for_bits_and_more_for_accuracy(lower: bool, wins: bool) -> None:
    low, high = (
        Result(
            values=np.array([[v, 1.0]] * 10) + [[i % 2 * 0.1, 0] for i in range(10)], lower=lower
        )
        for v in (0.1, 0.7)
    )
    assert high.beats(low) is wins
    assert low.beats(high) is not wins
    assert high.beside(low, draws=50, seed=0).verdict == ("better" if wins else "worse")


def test_an_unchanged_soup_is_not_added(models, texts, tmp_path: Path) -> None:
    """A copy of the best model leaves the average as it is: >= would add it, > does not."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(models["uni"], copy)
    words = ["--greedy", "--text", texts[0], "-o", str(tmp_path / "out")]
    assert main(["soup", models["uni"], str(copy), *words]) == 0
    record = json.loads((tmp_path / "out" / "surgery.json").read_text())
    second = record["facts"]["greedy"]["decisions"][1]
    assert second["soup"] == second["alone"]
    assert (second["added"], second["change"]["verdict"]) == (False, "equal")
    assert record["parameters"]["models"] == ["uni"]
    mine, theirs = (folder / "model.safetensors" for folder in (tmp_path / "out", copy))
    assert _data(mine) == _data(theirs)


def _data(file: Path) -> dict[str, bytes]:
    from safetensors.torch import load_file

    return {n: t.float().numpy().tobytes() for n, t in load_file(file).items()}


def test_questions_choose_by_accuracy(models, tmp_path: Path, capsys) -> None:
    lines = [
        {"good": f"{a} + {b} = {a + b}", "bad": f"{a} plus-minus {b}, {a + b} @"}
        for a, b in ((12, 34), (5, 6), (20, 30), (41, 17), (8, 9), (70, 21), (3, 3), (55, 44))
    ]
    quiz = tmp_path / "quiz.jsonl"
    quiz.write_text("\n".join(map(json.dumps, lines)) + "\n")
    words = ["--greedy", "--pairs", str(quiz), "-o", str(tmp_path / "out"), "--json"]
    assert main(["soup", models["base"], models["arith"], *words]) == 0
    told = json.loads(capsys.readouterr().out)["facts"]["greedy"]
    assert told["unit"] == "accuracy"
    assert told["documents"] == len(lines)
    assert [d["alone"] for d in told["decisions"]] == sorted(
        (d["alone"] for d in told["decisions"]), reverse=True
    )


def test_a_dry_run_counts_evaluations_and_loads_nothing(models, texts, tmp_path, capsys) -> None:
    words = ["--greedy", "--text", texts[0], "-o", str(tmp_path / "out"), "--dry-run", "--json"]
    assert main(["soup", *models.values(), *words]) == 0
    assert json.loads(capsys.readouterr().out)["evaluations"] == 7
    assert not (tmp_path / "out").exists()
