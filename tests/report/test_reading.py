"""What is read: lineages as far as they are local, runs that still go on, fronts."""

from __future__ import annotations

import itertools
import random

import pytest

from reported import save_record, save_recovered, save_training
from surgery.report.lineage import MOST
from surgery.report.pareto import COSTS, QUALITY, Point, front
from surgery.report.pedigree import places
from surgery.report.reading import read_all, read_training


def test_a_lineage_follows_local_inputs_and_teachers(tmp_path):
    (tmp_path / "base").mkdir()
    student = save_record(tmp_path / "student", tmp_path / "base", "org/other", "/gone/away")
    healed = save_recovered(tmp_path / "healed", student, tmp_path / "base")
    lineage = read_all([healed]).lineage
    names = {key: model.name for key, model in lineage.models.items()}
    assert sorted(names.values()) == ["away", "base", "healed", "other", "student"]
    top = lineage.models[str(healed)]
    assert [names[key] for key in top.inputs] == ["student"]
    assert [names[key] for key in top.teachers] == ["base"]
    generations = {names[key]: n for key, n in lineage.generations().items()}
    assert generations == {"base": 0, "other": 0, "away": 0, "student": 1, "healed": 2}


def test_a_base_and_its_adapter_are_two_inputs(tmp_path):
    for name in ("base", "m.surgery-run/trained"):
        (tmp_path / name).mkdir(parents=True)
    made = save_record(tmp_path / "m", f"{tmp_path / 'base'}+{tmp_path / 'm.surgery-run/trained'}")
    names = [model.name for model in read_all([made]).lineage.models.values()]
    assert names == ["m", "base", "m.surgery-run/trained"]


def test_a_circle_of_forged_records_ends(tmp_path):
    save_record(tmp_path / "a", tmp_path / "b")
    save_record(tmp_path / "b", tmp_path / "a", tmp_path / "b")
    lineage = read_all([tmp_path / "a"]).lineage
    assert len(places(lineage)) == 2


@pytest.mark.parametrize("seed", range(20))
def test_generations_are_the_longest_ways_from_an_origin(seed, tmp_path):
    draw = random.Random(seed)
    edges = {i: [j for j in range(i) if draw.random() < 0.4] for i in range(8)}
    for i, inputs in edges.items():
        save_record(tmp_path / str(i), *(tmp_path / str(j) for j in inputs))
    lineage = read_all([tmp_path / str(i) for i in draw.sample(range(8), 8)]).lineage
    expected = {}
    for i, inputs in edges.items():
        expected[str(tmp_path / str(i))] = 1 + max(
            (expected[str(tmp_path / str(j))] for j in inputs), default=-1
        )
    assert lineage.generations() == expected


def test_a_lineage_too_long_to_show_is_cut_and_says_so(tmp_path):
    for i in range(MOST + 5):
        save_record(tmp_path / str(i), tmp_path / str(i + 1))
    lineage = read_all([tmp_path / "0"]).lineage
    assert not lineage.complete
    assert len(lineage.models) == MOST
    assert len(places(lineage)) == MOST


def test_a_broken_record_further_back_is_an_origin(tmp_path):
    made = save_record(tmp_path / "made", tmp_path / "old")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "surgery.json").write_text("{")
    assert [m.operation for m in read_all([made]).lineage.models.values()] == ["stack", None]


def test_the_line_being_written_is_left_out(tmp_path):
    run = read_training(save_training(tmp_path / "m.surgery-run", steps=3, tail='{"step": 3, "lo'))
    assert (run.name, len(run.steps)) == ("m", 3)


def test_a_loss_that_is_no_number_is_a_gap(tmp_path):
    tail = '{"step": 3, "loss": NaN}\n'
    run = read_training(save_training(tmp_path / "m.surgery-run", steps=3, tail=tail))
    assert [step.number("loss") for step in run.steps] == [2.0, 1.9, 1.8, None]


def test_a_front_is_what_nothing_dominates():
    costs = COSTS[:2]
    grid = itertools.product((1.0, 2.0), repeat=3)
    points = [
        Point(f"{bits}{size}{speed}", {QUALITY: bits, costs[0].key: size, costs[1].key: speed})
        for bits, size, speed in grid
    ]
    assert [point.label for point in front(points, costs)] == ["1.01.02.0"]
    assert front(points[:1] * 2, costs) == points[:1] * 2  # equal models share the front
    assert front([Point("unknown", {QUALITY: 1.0})], costs) == []
