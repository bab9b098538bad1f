"""Stages of growing depth: the maps, the shares of tokens, and a pipeline that runs."""

from __future__ import annotations

import json

import pytest
from layer_oracle import depth, stored

from cli.main import main
from growth.stages import plan_stages, ranges
from structures import load
from surgery.errors import RecipeError, SurgeryError

MAPS = {
    ("progressive", 16, None): [[0, 1, 2, 3] * 2, [*range(8)] * 2],
    ("gradual", 8, 3): [[0, 1, 2, 3, 2, 3], [0, 1, 2, 3, 4, 5, 4, 5]],
    ("gradual", 8, 2): [[0, 1, 2, 3, 0, 1, 2, 3]],
    ("midas", 8, 3): [[0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 2, 3, 4, 5]],
    ("midas", 6, 3): [[0, 1, 1, 2, 3], [0, 1, 2, 2, 3, 4]],
}


@pytest.mark.parametrize(("schedule", "to", "stages"), MAPS)
def test_maps_are_the_schedules(opened, schedule, to, stages):
    found = plan_stages(opened("llama"), to=to, schedule=schedule, stages=stages)
    maps = MAPS[schedule, to, stages]
    assert [list(stage.layer_map) for stage in found] == [[], *maps]
    assert [stage.layers for stage in found] == [4, *(len(m) for m in maps)]


@pytest.mark.parametrize(("alpha", "parts"), [(0, [1, 1, 1]), (1, [1, 2, 3]), (2, [1, 4, 9])])
def test_shares_are_proportional_to_the_power_of_the_stage(opened, alpha, parts):
    shares = [part / sum(parts) for part in parts]
    found = plan_stages(
        opened("llama"), to=8, schedule="midas", stages=3, tokens=1.4e9, alpha=alpha
    )
    assert [stage.share for stage in found] == pytest.approx(shares)
    assert [stage.tokens for stage in found] == pytest.approx([1.4e9 * share for share in shares])


@pytest.mark.parametrize("layers", [[0, 1, 2, 3, 2, 3], [0, 0, 0], [3], [0, 2, 4], [5, 6, 0, 1]])
def test_ranges_are_read_back(layers):
    from growth.depth import parse_layers

    assert list(parse_layers(ranges(layers), option="--map")) == layers


WRONG = {
    "shallower": ({"to": 4, "schedule": "midas", "stages": 2}, "--to 4"),
    "no doubling": ({"to": 12, "schedule": "progressive"}, "--to 12"),
    "stages of doubling": ({"to": 8, "schedule": "progressive", "stages": 3}, "--stages 3"),
    "one stage": ({"to": 8, "schedule": "midas", "stages": 1}, "^--stages 1: is below 2"),
    "unequal": ({"to": 9, "schedule": "midas", "stages": 3}, "no equal blocks"),
    "too many": ({"to": 6, "schedule": "gradual", "stages": 5}, "no equal blocks"),
    "no whole blocks": ({"to": 10, "schedule": "midas", "stages": 3}, "no whole number"),
    "tokens": ({"to": 8, "schedule": "midas", "stages": 2, "tokens": -1.0}, "--tokens"),
    "alpha": ({"to": 8, "schedule": "midas", "stages": 2, "alpha": -1.0}, "--alpha"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_asks_are_refused(opened, case):
    asked, told = WRONG[case]
    with pytest.raises(RecipeError, match=told):
        plan_stages(opened("llama"), **asked)


def test_a_config_that_cannot_follow_is_refused_before_any_stage(opened):
    with pytest.raises(SurgeryError):
        plan_stages(opened("deepseek_v3"), to=8, schedule="progressive")


@pytest.mark.parametrize("schedule", ["midas", "gradual"])
def test_the_pipeline_runs_as_it_is_written(schedule, structure, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = structure("qwen3")
    asked = ["stages", str(model), "--to", "8", "--schedule", schedule, "--stages", "3"]
    assert main([*asked, "--tokens", "3B", "-o", "grow.yml"]) == 0
    assert "1.5 B" in capsys.readouterr().out
    assert main(["run", "grow.yml"]) == 0
    grown, info = load("qwen3", tmp_path / "grow" / "layers-8")
    assert {k: v for k, v in info.items() if v} == {}
    assert depth(grown.config) == 8
    whole = list(range(4))
    for layer_map in MAPS[schedule, 8, 3]:
        whole = [whole[n] for n in layer_map]
    old, new = stored(model), stored(tmp_path / "grow" / "layers-8")
    for layer, source in enumerate(whole):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert new[name.format(layer)].equal(old[name.format(source)])


@pytest.mark.parametrize(("to", "depths"), [(8, [4, 8]), (6, [4, 6]), (10, [4, 6, 8, 10])])
@pytest.mark.parametrize("schedule", ["midas", "gradual"])
def test_without_stages_there_are_as_few_as_fit(schedule, to, depths, opened):
    found = plan_stages(opened("llama"), to=to, schedule=schedule)
    assert [stage.layers for stage in found] == depths


def test_the_depth_alone_is_enough(structure, capsys):
    assert main(["stages", str(structure("llama")), "--to", "8"]) == 0
    assert "command: stack" in capsys.readouterr().out


def test_json_holds_the_file_and_the_stages(structure, capsys):
    asked = ["stages", str(structure("llama")), "--to", "8", "--schedule", "progressive", "--json"]
    assert main(asked) == 0
    told = json.loads(capsys.readouterr().out)
    assert [stage["layers"] for stage in told["stages"]] == [4, 8]
    assert "command: stack" in told["pipeline"]


def test_a_file_that_stands_there_is_kept(structure, tmp_path, capsys):
    file = tmp_path / "grow.yml"
    file.write_text("mine")
    asked = ["stages", str(structure("llama")), "--to", "8", "--stages", "2", "-o", str(file)]
    assert main(asked) == 1
    assert file.read_text() == "mine"
    assert main([*asked, "--force"]) == 0
    assert "command: stack" in file.read_text()
    capsys.readouterr()
