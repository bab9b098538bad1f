"""Checkpoints know nothing of processes: two to one, one to two, the same values."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from recover.two_ranks import KINDS, Run
from surgery.recover import sharded
from surgery.recover.checkpoints import Checkpoints
from surgery.recover.distributed import World

pytestmark = pytest.mark.slow  # processes that start torch anew, each for seconds

ALONE = World(0, 1, torch.device("cpu"))
TABLES = ("weights", "optimizer")


class Both(NamedTuple):
    """What two processes told, and what one alone did before."""

    root: Path
    kind: str
    told: list[dict[str, Any]]
    losses: list[float]


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Both]:
    root = tmp_path_factory.mktemp("both")
    losses = {}
    with ExitStack() as others:
        for kind in KINDS:
            run = Run(ALONE, kind)
            run.train(0, 3)
            run.save(root / kind / "one", 3)
            losses[kind] = run.train(3, 6)
            others.enter_context(Checkpoints(root / kind / "locked")).save(1, {"progress": 1})
        launch(root)
    told = [json.loads((root / f"told{rank}.json").read_text()) for rank in range(2)]
    return {
        kind: Both(root / kind, kind, [rank[kind] for rank in told], losses[kind]) for kind in KINDS
    }


def launch(root: Path) -> None:
    script = str(Path(__file__).with_name("two_ranks.py"))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, str(root)]
    ranks = [subprocess.Popen([*command, str(rank)], env=env) for rank in range(2)]
    try:
        assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.fixture(params=KINDS)
def both(every: dict[str, Both], request: pytest.FixtureRequest) -> Both:
    return every[request.param]


# Muon orthogonalises in bfloat16, so that other orders of summing show after a step.
CLOSE = {"adamw": 1e-5, "muon": 1e-2}


def tables(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for name in TABLES:
        table = load_file(folder / "step-00000003" / f"{name}.safetensors")
        found.update({f"{name}/{key}": value for key, value in table.items()})
    return found


def test_two_processes_go_on_from_their_own_as_if_never_stopped(both: Both) -> None:
    for told in both.told:
        assert told["two again"] == told["two"]
        assert told["random again"] == told["random"]


def test_one_to_two_to_file_gives_every_bit_back(both: Both) -> None:
    one, again = tables(both.root / "one"), tables(both.root / "one_again")
    assert one.keys() == again.keys()
    assert {name for name in one if not torch.equal(one[name], again[name])} == set()


def test_two_to_one_gives_every_bit(both: Both, tmp_path: Path) -> None:
    run = Run(ALONE, both.kind)
    assert run.load(both.root / "two") == 3
    run.save(tmp_path, 3)
    two, one = tables(both.root / "two"), tables(tmp_path)
    assert two.keys() == one.keys()
    assert {name for name in two if not torch.equal(two[name], one[name])} == set()


def test_two_processes_save_what_one_does_to_rounding(both: Both) -> None:
    one, two = tables(both.root / "one"), tables(both.root / "two")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=CLOSE[both.kind])


def test_two_to_one_goes_on_with_the_same_losses(both: Both) -> None:
    run = Run(ALONE, both.kind)
    run.load(both.root / "two")
    assert run.train(3, 6) == pytest.approx(both.told[0]["two"], rel=CLOSE[both.kind])


def test_one_to_two_goes_on_with_the_same_losses(both: Both) -> None:
    for told in both.told:
        assert told["step"] == 3
        assert told["one"] == pytest.approx(both.losses, rel=CLOSE[both.kind])


def test_frozen_weights_are_not_saved(both: Both) -> None:
    saved = load_file(both.root / "two" / "step-00000003" / "weights.safetensors")
    assert set(saved) == {"first.weight", "first.bias", "last.weight", "scale"}


def test_processes_beyond_the_saved_ones_draw_other_numbers(both: Both) -> None:
    first, second = (told["random other"] for told in both.told)
    assert first != second


@pytest.mark.parametrize(
    ("what", "kind", "told"),
    [
        ("full", "StepError", "writing failed (No space left on device); free some space"),
        ("locked", "PlanError", "another run is working in it"),
        ("settings", "RecipeError", "--lr 1: the run in"),
    ],
)
def test_what_stops_the_first_process_stops_all_with_its_sentence(
    what: str, kind: str, told: str, both: Both
) -> None:
    first, second = (answer[what] for answer in both.told)
    assert first == second
    assert first[0] == kind
    assert told in first[1]


def test_after_a_full_disk_all_go_on_from_the_older_one(both: Both) -> None:
    assert [told["after"] for told in both.told] == [3, 3]


def test_one_tensor_is_gathered_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def gathered(tensor: torch.Tensor) -> torch.Tensor:
        assert all(known() is None for known in alive)
        whole = tensor.clone()
        alive.append(weakref.ref(whole))
        return whole

    monkeypatch.setattr(sharded, "gathered", gathered)
    tensors = {str(number): torch.ones(4) for number in range(5)}
    sharded.write_tensors(tmp_path / "x.safetensors", tensors, ALONE)
    assert len(alive) == 5
