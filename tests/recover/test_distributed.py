"""Several processes train what one does: `torchrun -m surgery recover` on gloo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cli.main import main
from healing import LOADING, load, tensors
from launching import TESTS, environment, in_two
from recovering import BASE, TEXT, losses, recovered, words

pytestmark = pytest.mark.slow  # processes that start torch anew, each for seconds


def trained_by_two(student: Path, out: Path, *, code: int = 0, **options) -> None:
    in_two(TESTS / "training.py", student, out, json.dumps(options), code=code)


def close(one: list[float], other: list[float], within: float = 1e-5) -> bool:
    return len(one) == len(other) and float(np.abs(np.subtract(one, other)).max()) < within


MODES = [
    pytest.param("lora", {"teacher": str(BASE)}, marks=pytest.mark.slow, id="lora"),
    pytest.param("full", {"batch_tokens": 192, "micro_tokens": 64}, id="full, odd batches"),
    pytest.param("norms", {}, marks=pytest.mark.slow),
    pytest.param("half", {}, marks=pytest.mark.slow),
    pytest.param("full", {"optimizer": "muon"}, marks=pytest.mark.slow, id="muon"),
    pytest.param("lora", {"losses": {"kl": 1.0, "hidden_mse": 0.1}, "teacher": str(BASE),
                          "checkpointing": True}, marks=pytest.mark.slow, id="states"),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "options"), MODES)
def test_two_processes_have_the_losses_of_one(mode, options, student, tmp_path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    recovered(student("pruned"), one, train=mode, **options)
    trained_by_two(student("pruned"), two, train=mode, **options)
    # Muon's iteration is in bfloat16, which tells the last bits of gradients from each other.
    within = 1e-3 if options.get("optimizer") == "muon" else 1e-5
    assert close(losses(two), losses(one), within)
    old, new = tensors(one), tensors(two)
    assert all(float((old[n].float() - new[n].float()).abs().max()) < 0.01 for n in old)


KINDS = [
    ("tied", "lora", {}),  # layers that share weights, and factors
    ("relaxed", "full", {}),
    ("expanded", "new", {"precision": "bfloat16"}),
    ("upcycled", "lora", {}),  # fused experts: read whole
    ("pruned", "lora", {"lora_init": "pissa"}),
    ("sparse", "lora", {"teacher": str(BASE)}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "mode", "options"), KINDS)
def test_any_student_trains_in_two_processes_as_in_one(
    kind, mode, options, student, tmp_path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    recovered(student(kind), one, train=mode, **options)
    trained_by_two(student(kind), two, train=mode, **options)
    assert close(losses(two), losses(one), 2e-2 if "precision" in options else 1e-5)
    old, new = tensors(one), tensors(two)
    assert old.keys() == new.keys()
    assert all(float((old[n].float() - new[n].float()).abs().max()) < 0.01 for n in old)


@pytest.mark.parametrize("mode", ["full", "lora", "norms"])
@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 2])
def test_the_number_of_processes_may_change_on_the_way(mode, first, student, tmp_path) -> None:
    options = {"train": mode, "tokens": 8 * 256}
    whole, out = tmp_path / "whole", tmp_path / "out"
    recovered(student("pruned"), whole, **options)
    if first == 1:
        program = (TESTS / "training.py", student("pruned"), out)
        told = json.dumps({**options, "ask_at_step": 3})
        done = subprocess.run(
            (sys.executable, *program, told), env=environment(), check=False, timeout=120
        )
        assert done.returncode == 75
        trained_by_two(student("pruned"), out, **options)
    else:
        trained_by_two(student("pruned"), out, code=1, ask_at_step=3, **options)
        assert len(losses(out)) == 4
        recovered(student("pruned"), out, **options)
    assert close(losses(out), losses(whole))


def test_the_command_writes_one_output_and_tells_once(student, tmp_path) -> None:
    out = tmp_path / "out"
    line = words(student("sparse"), out, "--json", "--held-out", str(TEXT), train="full")
    done = in_two("-m", "surgery", *line)
    told = json.loads(done.stdout)
    assert told["processes"] == 2
    assert told["held_out"]["after"] < told["held_out"]["before"]
    assert not any(load(out)[1][key] for key in LOADING)
    assert main(["verify", str(out)]) == 0
    old, new = tensors(student("sparse")), tensors(out)
    masked = [n for n in old if "proj" in n]
    assert all(bool((new[n][old[n] == 0] == 0).all()) for n in masked)


@pytest.mark.slow
def test_a_wrong_ask_ends_all_processes(student, tmp_path) -> None:
    line = words(student("pruned"), tmp_path / "out", context=512)
    done = in_two("-m", "surgery", *line, code=1)
    assert "--context 512: is more than" in done.stderr
    assert list(tmp_path.iterdir()) == []
