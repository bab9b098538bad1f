"""A dry run tells what would be done, why, and how much disk it takes; nothing is written."""

import json
from pathlib import Path

import pytest

from cli.main import main
from engine import tiny
from pipeline import bench


def told(capsys, *words: str) -> dict:
    assert main(["run", "p.yml", "--dry-run", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def states(found: dict) -> dict[str, str]:
    return {one["step"]: one["state"] for one in found["steps"]}


def test_a_first_dry_run_plans_all_and_writes_nothing(here: Path, capsys) -> None:
    bench.write()
    before = tiny.tree(here)
    found = told(capsys)
    assert set(states(found).values()) == {"run"}
    assert tiny.tree(here) == before
    assert not Path("p").exists()
    bench.run(capsys)
    sizes = [sum(f.stat().st_size for f in Path("p", n).glob("*.safetensors")) for n in
             ("soup", "deep", "shallow")]  # fmt: skip
    assert [one["disk"] for one in found["steps"]] == [*sizes, 0]
    assert sum(sizes) <= found["disk_needed"] < sum(sizes) + (60 << 20)


def test_what_depends_on_how_a_step_comes_out_is_told_so(here: Path, capsys) -> None:
    bench.write()
    bench.run(capsys)
    assert set(states(told(capsys)).values()) == {"fresh"}
    bench.write(bench.STEPS.replace("factor: {factor}", 'map: "0-1,0-1"'))
    before = tiny.tree(here)
    found = told(capsys)
    assert states(found) == {
        "soup": "fresh", "deep": "run", "shallow": "perhaps", "check": "perhaps",
    }  # fmt: skip
    assert found["steps"][2]["why"] == "depends on how deep comes out"
    assert tiny.tree(here) == before


def test_removed_outputs_are_planned_with(here: Path, capsys) -> None:
    steps = bench.STEPS.replace("models: [a, b]", "models: [a, b]\n    keep: false")
    bench.write(steps)
    bench.run(capsys)
    assert states(told(capsys))["soup"] == "removed"
    bench.write(steps, factor=3)
    found = told(capsys)
    assert states(found) == {"soup": "run", "deep": "run", "shallow": "run", "check": "perhaps"}
    assert found["steps"][0]["why"] == "it was removed after use, and deep needs it"


def test_a_person_gets_a_table(here: Path, capsys) -> None:
    bench.write()
    assert main(["run", "p.yml", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "soup" in said
    assert "it is not there" in said
    assert "needed at most" in said
    assert "nothing was written" in said


def test_a_person_reads_what_was_done_and_why(here: Path, capsys) -> None:
    bench.write()
    assert main(["run", "p.yml"]) == 0
    assert main(["run", "p.yml"]) == 0
    said = capsys.readouterr().out
    assert "made      p/soup" in said
    assert "measured  p/check.json" in said
    assert "deep     skipped   nothing changed" in said


def test_a_disk_that_is_too_small_stops_before_the_first_step(here, capsys, monkeypatch) -> None:
    bench.write()
    monkeypatch.setattr("surgery.pipeline.folder.Folder.free", lambda _: 1000)
    assert "needs up to" in bench.refused(capsys, code=1)
    assert not Path("p/soup").exists()


@pytest.mark.parametrize("words", [("--dry-run",), ()])
def test_planning_loads_no_torch(here: Path, capsys, words) -> None:
    from test_cli import modules_after

    bench.write("steps:\n  deep: {command: stack, base: a, factor: 2}\n")
    assert not modules_after("run", "p.yml", *words) & {"torch", "transformers", "peft"}


def test_what_a_command_tells_beside_its_plan_is_told_once_when_it_runs(here, capsys) -> None:
    tiny.write(here / "c", seed=2)
    bench.write(
        "steps:\n  soup: {command: soup, models: [a, b]}\n"
        "  moved: {command: transfer, old-base: a, tuned: soup, new-base: c}\n"
    )
    assert main(["run", "p.yml", "--dry-run", "--json"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["run", "p.yml", "--json"]) == 0
    said = capsys.readouterr()
    assert said.err.count("cos(C-A, B-A)") == 1
    assert json.loads(said.out)["steps"][1]["state"] == "made"
