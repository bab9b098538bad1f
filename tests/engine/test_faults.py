"""Every call that changes the disk is made to fail, in five ways: nothing half-done shows."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import tiny

import surgery.publish
from growth.stack import stack
from surgery.checkpoint import open_checkpoint
from surgery.errors import Interrupted, SurgeryError
from surgery.run import run

CALLS = ("mkdir", "open", "posix_fallocate", "pwrite", "write", "fsync", "replace", "rename")
CALLS += ("unlink", "rmdir", "ftruncate")
WRITES = ("pwrite", "write")
MODES = ("kill", "full", "io", "interrupt", "short")
DONE, FAILED, STOPPED = 0, 1, 75
SHARD = 20_000  # bytes: two shards


class Fault:
    """Counts calls that change the disk, and makes one of them go wrong."""

    def __init__(self, mode: str, at: int) -> None:
        self.mode, self.at, self.count = mode, at, 0

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self.wrap(name, getattr(os, name)))
        surgery.publish.exchange = self.wrap("exchange", surgery.publish.exchange)

    def wrap(self, name: str, real: Callable) -> Callable:
        def call(*args, **kwargs):
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **kwargs)
            self.count += 1
            if self.count != self.at:
                return real(*args, **kwargs)
            return self.strike(name, real, args, kwargs)

        return call

    def strike(self, name: str, real: Callable, args: tuple, kwargs: dict):
        if self.mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.mode == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        if self.mode == "io":
            raise OSError(errno.EIO, "Input/output error")
        if self.mode == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        if self.mode == "short" and name in WRITES:
            args = (args[0], args[1][: max(len(args[1]) // 2, 1)], *args[2:])
        return real(*args, **kwargs)


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; return its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(start_child(work), 0)[1])


def start_child(work: Callable[[], None]) -> int:
    """Start `work` in a forked process and return its number."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            work()
            code = DONE
        except (Interrupted, KeyboardInterrupt):
            code = STOPPED
        except SurgeryError:
            code = FAILED
        finally:
            os._exit(code)
    return pid


def make(base: Path, out: Path, *, force: bool = False, fault: Fault | None = None) -> None:
    if fault:
        fault.install()
    plan = stack(open_checkpoint(base), factor=2)
    run(plan, out, workers=1, shard_size=SHARD, force=force)


def count_calls(base: Path, out: Path, *, force: bool = False) -> int:
    read, write = os.pipe()

    def work() -> None:
        fault = Fault("none", 0)
        make(base, out, force=force, fault=fault)
        os.write(write, str(fault.count).encode())

    assert in_child(work) == DONE
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        return int(pipe.read())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("faults") / "base")


@pytest.mark.parametrize("mode", MODES)
def test_a_fault_at_any_call_leaves_no_output_and_a_resume_gives_the_same_bytes(
    base: Path, scratch: Path, mode: str
) -> None:
    make(base, scratch / "reference")
    wanted = tiny.tree(scratch / "reference")
    calls = count_calls(base, scratch / "counted")
    assert calls > 40
    for at in range(1, calls + 1):
        out = scratch / f"{mode}{at}"
        code = in_child(lambda out=out, at=at: make(base, out, fault=Fault(mode, at)))
        assert code in {"kill": (-9,), "short": (DONE,)}.get(mode, (DONE, FAILED, STOPPED)), at
        if out.exists():
            assert tiny.tree(out) == wanted, f"call {at}: the output shows, but is not whole"
        else:
            assert in_child(lambda out=out: make(base, out)) == DONE, at
            assert tiny.tree(out) == wanted, f"call {at}: the resumed output differs"
            assert not (scratch / f"{out.name}.surgery-partial").exists(), at


@pytest.mark.parametrize("mode", MODES)
def test_a_fault_while_replacing_leaves_the_old_or_the_new_model(
    base: Path, scratch: Path, mode: str
) -> None:
    other = tiny.write(scratch / "other", seed=1)
    make(base, scratch / "new")
    wanted = tiny.tree(scratch / "new")
    make(other, scratch / "old")
    before = tiny.tree(scratch / "old")
    calls = count_calls(base, scratch / "old", force=True)
    for at in range(1, calls + 1):
        out = scratch / f"{mode}{at}"
        make(other, out)
        in_child(lambda out=out, at=at: make(base, out, force=True, fault=Fault(mode, at)))
        assert tiny.tree(out) in (before, wanted), f"call {at}: neither old nor new"
        assert in_child(lambda out=out: make(base, out, force=True)) == DONE, at
        assert tiny.tree(out) == wanted, at


def test_every_shard_is_on_disk_before_it_is_renamed_and_its_folder_after(
    base: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace: list[tuple[str, str]] = []

    def path_of(fd: int) -> str:
        return str(Path(f"/proc/self/fd/{fd}").readlink())

    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (trace.append(("fsync", path_of(fd))), real_fsync(fd))[1]
    )
    monkeypatch.setattr(
        os, "replace", lambda a, b: (trace.append(("rename", str(b))), real_replace(a, b))[1]
    )
    make(base, scratch / "out")
    moved = trace.index(("rename", str(scratch / "out")))
    synced = {Path(path).name for call, path in trace[:moved] if call == "fsync"}
    assert {p.name for p in (scratch / "out").iterdir()} <= synced
    assert ("fsync", str(scratch)) in trace[moved:]
