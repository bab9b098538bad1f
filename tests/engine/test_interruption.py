"""A run that is killed, raced, interrupted or pulled away from under leaves nothing wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import tiny

from growth.prune import prune
from growth.stack import stack
from surgery.checkpoint import open_checkpoint, read_header
from surgery.errors import CheckpointError, Interrupted, PlanError, StepError
from surgery.run import run

REPO = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "surgery"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPO)}


def kill_midway(base: Path, out: Path) -> None:
    """Kill a run at two thirds of its calls: shards are there, some steps finished."""
    import test_faults

    at = test_faults.count_calls(base, out.with_name("counted")) * 2 // 3
    code = test_faults.in_child(
        lambda: test_faults.make(base, out, fault=test_faults.Fault("kill", at))
    )
    assert code == -9


def journal(out: Path) -> list[dict]:
    text = (out.parent / f"{out.name}.surgery-partial" / "journal").read_text()
    return [json.loads(line) for line in text.splitlines() if line][1:]


def test_a_resume_redoes_no_finished_step(base: Path, tmp_path: Path) -> None:
    kill_midway(base, tmp_path / "out")
    finished = journal(tmp_path / "out")
    assert 2 <= len(finished) < len(tiny.stacked(base).steps)
    report = run(tiny.stacked(base), tmp_path / "out", shard_size=20_000)
    assert report.reused == len(finished)
    run(tiny.stacked(base), tmp_path / "reference", shard_size=20_000)
    assert tiny.tree(tmp_path / "out") == tiny.tree(tmp_path / "reference")


def test_a_finished_step_whose_bytes_were_lost_is_done_again(base: Path, tmp_path: Path) -> None:
    kill_midway(base, tmp_path / "out")
    finished = journal(tmp_path / "out")
    name = next(iter(finished[0]["outputs"]))
    shards = sorted((tmp_path / "out.surgery-partial" / "out").glob("*.safetensors"))
    place = next(t for shard in shards for t in read_header(shard).tensors if t.name == name)
    with place.file.open("r+b") as file:
        file.seek(place.offset)
        byte = file.read(1)
        file.seek(place.offset)
        file.write(bytes([byte[0] ^ 1]))
    report = run(tiny.stacked(base), tmp_path / "out", shard_size=20_000)
    assert report.reused == len(finished) - 1
    run(tiny.stacked(base), tmp_path / "reference", shard_size=20_000)
    assert tiny.tree(tmp_path / "out") == tiny.tree(tmp_path / "reference")


def test_another_commands_unfinished_output_is_kept_unless_fresh(
    base: Path, tmp_path: Path
) -> None:
    kill_midway(base, tmp_path / "out")
    other = prune(open_checkpoint(base), layers="0")
    with pytest.raises(PlanError, match=r"unfinished output of another command.*--fresh"):
        run(other, tmp_path / "out")
    assert journal(tmp_path / "out")
    run(other, tmp_path / "out", fresh=True)
    assert not (tmp_path / "out.surgery-partial").exists()


def test_of_three_runs_into_one_output_one_wins(scratch: Path) -> None:
    import test_faults

    base = tiny.write(scratch / "base")
    wanted = None
    for number in range(40):
        out = scratch / f"out{number}"
        runs = [
            test_faults.start_child(lambda out=out: test_faults.make(base, out)) for _ in range(3)
        ]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in runs]
        assert sorted(codes) == [0, 1, 1]
        wanted = wanted or tiny.tree(out)
        assert tiny.tree(out) == wanted
    assert not list(scratch.glob("*.surgery-partial"))


def test_an_input_that_changes_during_the_run_stops_it(base: Path, tmp_path: Path) -> None:
    plan = tiny.stacked(base)
    file = base / "model-00001-of-00002.safetensors"

    def change(*_: int) -> None:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)

    with pytest.raises(StepError, match="changed while it was read"):
        run(plan, tmp_path / "out", progress=change)
    assert not (tmp_path / "out").exists()


def test_an_input_replaced_after_planning_stops_the_run(base: Path, tmp_path: Path) -> None:
    plan = tiny.stacked(base)
    file = base / "model-00001-of-00002.safetensors"
    copy = file.with_suffix(".new")
    copy.write_bytes(file.read_bytes())
    copy.replace(file)
    with pytest.raises(StepError, match="changed while it was read"):
        run(plan, tmp_path / "out")


def test_an_interrupt_keeps_what_is_finished(base: Path, tmp_path: Path) -> None:
    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="run the same command again"):
        run(tiny.stacked(base), tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.surgery-partial").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_with_75_in_two_seconds(
    tmp_path: Path, number: signal.Signals
) -> None:
    source = tiny.sparse(tmp_path / "base.safetensors", 40, 32)
    out = tmp_path / "out.safetensors"
    words = [*COMMAND, "stack", str(source), "--factor", "2", "-o", str(out), "--workers", "1"]
    with subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        partial = tmp_path / "out.safetensors.surgery-partial" / "journal"
        limit = time.monotonic() + 30
        while not partial.exists() and time.monotonic() < limit:
            time.sleep(0.01)
        process.send_signal(number)
        sent = time.monotonic()
        _, told = process.communicate(timeout=30)
    assert process.returncode == 75, told
    assert time.monotonic() - sent < 5  # two seconds, and room for a loaded machine
    assert "run the same command again" in told
    assert not out.exists()


def test_a_truncated_copy_is_found_when_read(base: Path, tmp_path: Path) -> None:
    plan = tiny.stacked(base)
    os.truncate(base / "model-00002-of-00002.safetensors", 3000)
    with pytest.raises((StepError, CheckpointError)):
        run(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_threads_that_hang_keep_their_files_after_an_interrupt(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closed descriptors would be given to whatever is opened next, and be written to."""
    import threading

    from surgery import engine

    hung, released = threading.Event(), threading.Event()
    real = os.pwrite

    def stall(fd, data, offset):
        if threading.current_thread() is not threading.main_thread():
            hung.set()
            released.wait(20)
        return real(fd, data, offset)

    def stop(*_: int) -> None:
        hung.wait(20)
        raise KeyboardInterrupt

    plan = tiny.stacked(base)
    monkeypatch.setattr(engine, "GRACE", 0.1)
    monkeypatch.setattr(os, "pwrite", stall)
    with pytest.raises(Interrupted):
        run(plan, tmp_path / "out", progress=stop)
    victims = [(tmp_path / f"victim{i}").open("w+b", buffering=0) for i in range(40)]
    released.set()
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and thread.daemon:
            thread.join(20)
    assert all(os.fstat(victim.fileno()).st_size == 0 for victim in victims)
    for victim in victims:
        victim.close()


def test_a_resume_takes_the_files_beside_the_weights_anew(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from surgery.write import Partial

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (base / "chat_template.jinja").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(Partial, "publish", stop)
        with pytest.raises(Interrupted):
            run(tiny.stacked(base), tmp_path / "out")
    (tmp_path / "out.surgery-partial" / "out" / "stray.jinja").write_text("from elsewhere")
    run(tiny.stacked(base), tmp_path / "out")
    assert not (tmp_path / "out" / "stray.jinja").exists()


def test_a_result_that_cannot_be_had_leaves_nothing_in_the_way(base: Path, tmp_path: Path) -> None:
    plan = stack(open_checkpoint(base), factor=2, scale=["1:o_proj=1e30"])
    with pytest.raises(StepError, match="NaN or infinity"):
        run(plan, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
