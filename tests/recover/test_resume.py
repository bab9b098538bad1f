"""However a run is interrupted, the same command goes on and the losses are the same."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cli.main import main
from healing import tensors
from recovering import BASE, losses, recovered, words
from surgery.errors import RecipeError, StepError, TrainError
from surgery.recover import loop

TESTS = Path(__file__).parent
LONG = {"tokens": 12 * 256, "save_steps": 3}


def environment() -> dict[str, str]:
    paths = os.pathsep.join(map(str, TESTS.parents[:2]))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def in_process(student: Path, out: Path, **options) -> int:
    """Run a recovery as a program; return how it ended."""
    done = subprocess.run(
        (sys.executable, TESTS / "training.py", student, out, json.dumps(options)),
        env=environment(), timeout=120, capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode not in {0, 75, -signal.SIGKILL}:
        raise AssertionError(done.stderr.decode()[-2000:])
    return done.returncode


class Stopped(BaseException):
    """What no part of a run takes for its own."""


def broken_off(student: Path, out: Path, *, before: int, **options) -> None:
    """Begin a recovery in this process, and break it off before a step."""
    real = loop.Loop._step

    def step(self, number):
        if number == before:
            raise Stopped
        return real(self, number)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop.Loop, "_step", step)
        with pytest.raises(Stopped):
            recovered(student, out, **options)


@pytest.fixture(scope="module")
def whole(student, tmp_path_factory) -> Path:
    """A run that nobody interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    recovered(student("pruned"), out, teacher=str(BASE), **LONG)
    return out


def same(out: Path, whole: Path) -> None:
    """The losses, and what was written, are the same bit for bit."""
    assert losses(out) == losses(whole)
    one, other = tensors(out), tensors(whole)
    assert all(bool((one[name] == other[name]).all()) for name in other)


@pytest.mark.parametrize(
    "step", [7, *(pytest.param(step, marks=pytest.mark.slow) for step in (2, 11))]
)
def test_killed_in_a_step(step, student, whole, tmp_path) -> None:
    out, taught = tmp_path / "out", {"teacher": str(BASE), **LONG}
    died = in_process(student("pruned"), out, die_at_step=step, **taught)
    assert died == -signal.SIGKILL
    recovered(student("pruned"), out, **taught)
    same(out, whole)


def killed_at_calls(student, whole: Path, root: Path, numbers: list[int]) -> None:
    taught = {"teacher": str(BASE), **LONG}
    for number in numbers:
        out = root / f"{number}" / "out"
        out.parent.mkdir()
        died = in_process(student("pruned"), out, die_at_call=number, **taught)
        assert died in {0, -signal.SIGKILL}
        recovered(student("pruned"), out, force=True, **taught)
        same(out, whole)


def test_killed_inside_a_save(student, whole, tmp_path) -> None:
    killed_at_calls(student, whole, tmp_path, [33])


@pytest.mark.slow
def test_killed_anywhere(student, whole, tmp_path) -> None:
    numbers = random.Random(3).sample(range(1, 140), 12)
    killed_at_calls(student, whole, tmp_path, numbers)


@pytest.mark.slow
def test_broken_off_twice(student, whole, tmp_path) -> None:
    out, taught = tmp_path / "out", {"teacher": str(BASE), **LONG}
    for step in (4, 9):
        broken_off(student("pruned"), out, before=step, **taught)
    recovered(student("pruned"), out, **taught)
    same(out, whole)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_asked_to_stop_it_saves_and_exits_75(number, student, whole, tmp_path) -> None:
    out = tmp_path / "out"
    line = words(student("pruned"), out, "--teacher", str(BASE), tokens=12 * 256, loss="kl=1")
    running = subprocess.Popen(
        (sys.executable, "-m", "surgery", *line), env=environment(), stderr=subprocess.PIPE
    )
    try:
        wait_for(tmp_path / "out.surgery-run" / "metrics.jsonl")
        running.send_signal(number)
        told = running.communicate(timeout=60)[1].decode()
    finally:
        running.kill()
    assert running.returncode == 75
    assert "the same command goes on" in told
    assert not out.exists()
    assert main(line) == 0
    assert losses(out) == losses(whole)


def wait_for(path: Path, lines: int = 2) -> None:
    end = time.monotonic() + 60
    while not path.is_file() or len(path.read_text().splitlines()) < lines:
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_signal_in_a_step_ends_after_it(student, whole, tmp_path) -> None:
    out, taught = tmp_path / "out", {"teacher": str(BASE), **LONG}
    assert in_process(student("pruned"), out, ask_at_step=4, **taught) == 75
    assert len(losses(out)) == 5
    recovered(student("pruned"), out, **taught)
    same(out, whole)


def checkpoints(out: Path) -> list[Path]:
    return sorted((out.parent / f"{out.name}.surgery-run" / "checkpoints").glob("step-????????"))


@pytest.mark.parametrize(
    "file",
    [
        "weights.safetensors",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("state.json", "MANIFEST.json")),
    ],
)
def test_a_torn_checkpoint_is_passed_over_and_told(file, student, whole, tmp_path, capsys) -> None:
    out, taught = tmp_path / "out", {"teacher": str(BASE), **LONG}
    broken_off(student("pruned"), out, before=8, **taught)
    torn = checkpoints(out)[-1] / file
    os.truncate(torn, torn.stat().st_size // 2)
    line = words(student("pruned"), out, "--teacher", str(BASE), loss="kl=1", **LONG)
    assert main(line) == 0
    assert "is passed over" in capsys.readouterr().err
    same(out, whole)


def test_without_any_sound_checkpoint_it_starts_anew(student, whole, tmp_path) -> None:
    out, taught = tmp_path / "out", {"teacher": str(BASE), **LONG}
    broken_off(student("pruned"), out, before=8, **taught)
    for folder in checkpoints(out):
        (folder / "weights.safetensors").unlink()
    recovered(student("pruned"), out, **taught)
    same(out, whole)


def test_a_full_disk_is_a_sentence_and_loses_nothing(student, whole, tmp_path, monkeypatch) -> None:
    out, taught = tmp_path / "out", {"teacher": str(BASE), **LONG}
    real = loop.Loop._save

    def save(self, place):
        """Files may not grow beyond what the smallest part of a checkpoint needs."""
        if self.curve.step != 6:
            return real(self, place)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
        try:
            return real(self, place)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, ignored)

    with monkeypatch.context() as patched:
        patched.setattr(loop.Loop, "_save", save)
        with pytest.raises(StepError, match="writing failed"):
            recovered(student("pruned"), out, **taught)
    assert not out.exists()
    recovered(student("pruned"), out, **taught)
    same(out, whole)


@pytest.mark.parametrize(
    "kind", ["wsd", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("infinite", "power"))]
)
def test_more_tokens_extend_the_stable_phase(kind, student, tmp_path) -> None:
    """As if the run had been long from the start, but for its warming up: that stays."""
    short = {"schedule": kind, "tokens": 8 * 256}
    long = {"schedule": kind, "tokens": 14 * 256}
    recovered(student("pruned"), tmp_path / "short", **short)
    recovered(student("pruned"), tmp_path / "short", force=True, **long)
    if kind == "wsd":
        recovered(student("pruned"), tmp_path / "long", **long)
        same(tmp_path / "short", tmp_path / "long")
    assert len(losses(tmp_path / "short")) == 14


def test_an_extended_run_that_is_killed_goes_on_on_its_own_way(student, tmp_path) -> None:
    short, long = {"tokens": 8 * 256, "save_steps": 1}, {"tokens": 14 * 256, "save_steps": 1}
    recovered(student("pruned"), tmp_path / "out", **short)
    shutil.rmtree(tmp_path / "out")
    broken_off(student("pruned"), tmp_path / "out", before=7, **long)
    assert checkpoints(tmp_path / "out")[-1].name == "step-00000007"
    recovered(student("pruned"), tmp_path / "out", **long)
    recovered(student("pruned"), tmp_path / "long", **long)
    same(tmp_path / "out", tmp_path / "long")


def test_fewer_tokens_than_have_been_seen_are_refused(student, tmp_path) -> None:
    out = tmp_path / "out"
    broken_off(student("pruned"), out, before=11, **LONG)
    with pytest.raises(TrainError, match=r"has run 9 of 12 steps and kept none.*--fresh"):
        recovered(student("pruned"), out, **{**LONG, "tokens": 4 * 256})


@pytest.mark.parametrize(
    "change",
    [{"lr": 2e-3}, *(pytest.param(c, marks=pytest.mark.slow) for c in ({"seed": 1}, {"rank": 4}))],
)
def test_another_ask_is_refused_and_changes_nothing(change, student, tmp_path) -> None:
    out = tmp_path / "out"
    broken_off(student("pruned"), out, before=5, **LONG)
    folder = tmp_path / "out.surgery-run"
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(RecipeError):
        recovered(student("pruned"), out, **LONG, **change)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "change",
    [
        {"micro_tokens": 256, "keep": 3},
        pytest.param({"checkpointing": True}, marks=pytest.mark.slow),
    ],
)
def test_how_it_is_computed_may_change_on_the_way(change, student, tmp_path) -> None:
    out = tmp_path / "out"
    broken_off(student("pruned"), out, before=5, **LONG)
    recovered(student("pruned"), out, **LONG, **change)
    assert len(losses(out)) == 12


def test_fresh_starts_anew_whatever_lies_there(student, tmp_path) -> None:
    out = tmp_path / "out"
    recovered(student("pruned"), out, train="lora", lr=3e-3, **LONG)
    new = {"train": "full", "tokens": 5 * 256, "save_steps": 2, "resume": False}
    broken_off(student("pruned"), tmp_path / "other", before=4, **new)
    shutil.rmtree(out)
    broken_off(student("pruned"), out, before=4, **new)
    assert [path.name for path in checkpoints(out)] == ["step-00000002", "step-00000004"]
    again = {**new, "resume": True}
    recovered(student("pruned"), out, **again)
    recovered(student("pruned"), tmp_path / "other", **again)
    same(out, tmp_path / "other")
    assert sorted(p.name for p in (tmp_path / "out.surgery-run" / "trained").iterdir()) == [
        "trained.safetensors"
    ]


def test_two_runs_do_not_share_a_folder(student, tmp_path) -> None:
    from surgery.errors import PlanError
    from surgery.recover.lock import FolderLock

    lock = FolderLock(tmp_path / "out.surgery-run" / "checkpoints")
    lock.take()
    with pytest.raises(PlanError, match="another run is working in it"):
        recovered(student("pruned"), tmp_path / "out")
    lock.drop()


def test_a_finished_run_is_written_again_without_training(student, tmp_path) -> None:
    out = tmp_path / "out"
    recovered(student("pruned"), out)
    before, wanted = losses(out), tensors(out)
    shutil.rmtree(out)
    assert recovered(student("pruned"), out).curve.step == 8
    assert losses(out) == before
    assert all(bool((tensor == wanted[name]).all()) for name, tensor in tensors(out).items())
