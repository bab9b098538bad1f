"""Outputs that need not be kept go when their last user is done, and are not missed."""

from pathlib import Path

import pytest

from engine import tiny
from pipeline import bench
from pipeline.bench import FIRST, IDLE

STEPS = bench.STEPS.replace("models: [a, b]", "models: [a, b]\n    keep: false").replace(
    "factor: {factor}", "factor: {factor}\n    keep: false"
)
AWAY = {**IDLE, "soup": "removed", "deep": "removed"}


@pytest.fixture
def done(here: Path, capsys) -> Path:
    bench.write(STEPS)
    assert bench.states(capsys) == FIRST
    return here


def models() -> set[str]:
    return {p.name for p in Path("p").iterdir() if p.name != ".surgery-pipeline"}


def test_they_are_removed_and_a_second_run_does_nothing(done, capsys):
    assert models() == {"shallow", "check.json"}
    assert bench.states(capsys) == AWAY
    assert models() == {"shallow", "check.json"}


def test_what_is_remembered_of_them_takes_no_disk_to_speak_of(done):
    hidden = [p for p in Path("p/.surgery-pipeline").rglob("*") if p.is_file()]
    assert sum(p.stat().st_blocks * 512 for p in hidden) < 200_000


def test_they_are_made_again_where_a_user_needs_them(done, capsys):
    bench.write(STEPS, layers="1")
    found = bench.run(capsys)
    assert {n: one["state"] for n, one in found.items()} == FIRST
    assert found["deep"]["why"] == "it was removed after use, and shallow needs it"
    assert models() == {"shallow", "check.json"}


def test_a_user_that_is_gone_comes_back_with_the_same_bytes(done, capsys):
    wanted = tiny.tree(Path("p/shallow"))
    Path("p/shallow").rename("away")
    assert bench.states(capsys) == {**FIRST, "check": "skipped"}
    assert tiny.tree(Path("p/shallow")) == wanted


def test_a_change_at_the_start_remakes_all(done, capsys):
    file = next(iter(Path("a").glob("*.safetensors")))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert bench.states(capsys) == FIRST


def test_keeping_them_after_all_makes_them_when_they_are_needed_next(done, capsys):
    bench.write()
    assert bench.states(capsys) == AWAY
    bench.write(layers="1")
    assert bench.states(capsys) == FIRST
    assert {"soup", "deep"} <= models()


def test_without_what_it_remembers_they_are_made_again(done, capsys):
    Path("p/.surgery-pipeline/state.json").unlink()
    assert bench.states(capsys) == {**FIRST, "shallow": "skipped"}
    assert models() == {"shallow", "check.json"}


def test_what_another_command_made_is_not_removed(here, capsys):
    from cli.main import main

    Path("p").mkdir()
    assert main(["soup", "a", "b", "-o", "p/soup"]) == 0
    capsys.readouterr()
    bench.write(STEPS)
    assert bench.states(capsys) == {**FIRST, "soup": "skipped"}
    assert "soup" in models()
