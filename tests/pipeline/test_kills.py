"""A pipeline that is killed at any call that changes the disk goes on, and ends the same."""

import io
import json
import os
import sys
from pathlib import Path

import pytest

from engine import test_faults, tiny
from pipeline import bench
from surgery.errors import SurgeryError

STRIDE = {"kill": 7, "io": 23}  # every call was tried once; these keep the suite short

STEPS = bench.STEPS.replace("factor: {factor}", "factor: {factor}\n    keep: false")


def work(fault: test_faults.Fault | None = None, *, factor: int = 2) -> None:
    """Run the pipeline as a process of its own would, one thread at a time."""
    from cli.main import main

    sys.stdout = sys.stderr = io.StringIO()
    os.environ["SURGERY_DEBUG"] = "1"  # a fault that is not told in a sentence ends the process
    bench.write(STEPS, factor=factor)
    if fault:
        fault.install()
    if main(["run", "p.yml", "--workers", "1"]) != 0:
        raise SurgeryError("pipeline", "failed")


def visible(folder: Path) -> dict[str, str]:
    """Every file but what the pipeline remembers, whose stamps differ."""
    return {n: d for n, d in tiny.tree(folder).items() if not n.startswith(".surgery-pipeline")}


def count_calls() -> int:
    read, write = os.pipe()

    def count() -> None:
        fault = test_faults.Fault("none", 0)
        work(fault)
        os.write(write, str(fault.count).encode())

    assert test_faults.in_child(count) == 0
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        return int(pipe.read())


@pytest.mark.parametrize("mode", ["kill", "io"])
def test_after_a_fault_at_any_call_the_next_run_ends_as_if_there_was_none(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    tiny.write(scratch / "models" / "a")
    tiny.write(scratch / "models" / "b", seed=1)

    def enter(name: str) -> None:
        (scratch / name).mkdir()
        monkeypatch.chdir(scratch / name)
        for model in ("a", "b"):
            Path(model).symlink_to(scratch / "models" / model)

    enter("reference")
    calls = count_calls()
    wanted = visible(Path("p"))
    assert calls > 100
    assert "shallow/model.safetensors" in wanted
    assert not any(name.startswith("deep") for name in wanted)
    for at in range(1, calls + 1, STRIDE[mode]):
        enter(f"{mode}{at}")
        code = test_faults.in_child(lambda at=at: work(test_faults.Fault(mode, at)))
        assert code in ((-9,) if mode == "kill" else (0, 1)), at
        for made in Path("p").glob("*/surgery.json"):
            assert visible(made.parent).items() <= whole(scratch, made.parent.name), at
        assert test_faults.in_child(work) == 0, at
        assert visible(Path("p")) == wanted, at


def whole(scratch: Path, name: str) -> set[tuple[str, str]]:
    """The files of an output as an undisturbed run makes it."""
    kept = scratch / "kept"
    if not kept.exists():
        kept.mkdir()
        here = Path.cwd()
        os.chdir(kept)
        for model in ("a", "b"):
            Path(model).symlink_to(scratch / "models" / model)
        assert test_faults.in_child(keep_all) == 0
        os.chdir(here)
    return set(tiny.tree(kept / "p" / name).items())


def keep_all() -> None:
    from cli.main import main

    sys.stdout = io.StringIO()
    bench.write()
    assert main(["run", "p.yml"]) == 0


def test_a_killed_step_goes_on_where_it_stopped(here: Path, capsys) -> None:
    calls = count_calls()
    bench.write(STEPS)
    Path("p").rename("done")
    for at in range(calls // 3, calls, 3):
        assert test_faults.in_child(lambda at=at: work(test_faults.Fault("kill", at))) == -9
        journals = list(Path("p").glob("*.surgery-partial/journal"))
        lines = [json.loads(line) for j in journals for line in j.read_text().split("\n") if line]
        if len(lines) > 2:
            break
    else:
        pytest.fail("no kill left a finished plan step behind")
    found = bench.run(capsys)
    assert sum(one["steps_resumed"] for one in found.values()) >= len(lines) - 1


def test_the_unfinished_output_of_a_changed_step_is_thrown_away(here: Path, capsys) -> None:
    calls = count_calls()
    Path("p").rename("done")
    for at in range(calls // 3, calls):
        test_faults.in_child(lambda at=at: work(test_faults.Fault("kill", at), factor=3))
        if list(Path("p").glob("deep.surgery-partial/journal")):
            break
    bench.write(STEPS)
    bench.run(capsys)
    assert visible(Path("p")) == visible(Path("done"))
    assert not list(Path("p").glob("*.surgery-partial"))
