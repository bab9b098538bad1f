"""A disk that refuses, a folder that is taken: the older checkpoint stays, one sentence tells."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from recover.small_run import STATE, names, save
from surgery.errors import CheckpointError, PlanError, StepError
from surgery.recover.checkpoints import Checkpoints

REFUSALS = [
    (name, code)
    for name in ("mkdir", "open", "write", "fsync", "rename", "replace")
    for code in (errno.ENOSPC, errno.EACCES)
]


@pytest.mark.parametrize(("name", "code"), REFUSALS)
def test_a_disk_that_refuses_leaves_the_older_one_usable(
    name: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with save(tmp_path, 1) as checkpoints:
        before = names(tmp_path)
        real = getattr(os, name)

        def refuse(*args: Any, **more: Any) -> Any:
            reads = name == "open" and not args[1] & os.O_CREAT
            if reads:
                return real(*args, **more)
            raise OSError(code, os.strerror(code), args[0])

        with monkeypatch.context() as patched:
            patched.setattr(os, name, refuse)
            with pytest.raises(StepError, match=rf"writing failed \({os.strerror(code)}\)") as told:
                checkpoints.save(2, STATE)
        assert "\n" not in str(told.value)
        found = checkpoints.load_newest()
        assert found
        assert found[0] == (2 if name == "replace" else 1)  # it was whole; LATEST alone was not
        checkpoints.save(3, STATE)
        assert set(before) <= {*names(tmp_path), "step-00000001"}


def test_every_write_may_be_the_one_that_fills_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    with save(tmp_path, 1) as checkpoints:
        for last in range(4):  # header, tensor, facts, manifest
            left = [last]

            def write(fd: int, data: Any, left: list[int] = left) -> int:
                left[0] -= 1
                if left[0] < 0:
                    real(fd, data[:3])
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real(fd, data)

            with monkeypatch.context() as patched:
                patched.setattr(os, "write", write)
                with pytest.raises(StepError, match=r"No space left.*; free some space"):
                    checkpoints.save(2, STATE)
            assert names(tmp_path) == ["LATEST", "lock", "step-00000001"]


def test_few_bytes_at_a_time_make_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:7]))
    with save(tmp_path, 1) as checkpoints:
        found = checkpoints.load_newest()
    assert found
    assert torch.equal(found[1].state()["weights"]["a"], STATE["weights"]["a"])


def test_what_may_not_be_read_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with save(tmp_path, 1) as checkpoints:

        def refuse(path: Path) -> bytes:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied\)"):
            checkpoints.load_newest()
    assert "step-00000001" in names(tmp_path)


def test_what_cannot_be_renamed_is_passed_over_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with save(tmp_path, 1, 2) as checkpoints:
        (tmp_path / "step-00000002" / "state.json").unlink()

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(os, "rename", refuse)
        found = checkpoints.load_newest()
    assert found
    assert found[0] == 1
    assert "keeps its name (Read-only file system)" in checkpoints.notes[0]


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with save(tmp_path, 1):
        for act in (lambda c: c.save(2, STATE), lambda c: c.load_newest()):
            with pytest.raises(PlanError, match="another run is working in it; wait"):
                act(Checkpoints(tmp_path))
    save(tmp_path, 2).close()


def test_the_lock_of_a_killed_run_is_free(tmp_path: Path) -> None:
    hold = (
        "import fcntl,os,sys,time; fd=os.open(sys.argv[1], os.O_CREAT|os.O_RDWR);"
        "fcntl.flock(fd, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(PlanError, match="another run"):
            save(tmp_path, 1)
        other.send_signal(signal.SIGKILL)
        other.wait(10)
    save(tmp_path, 1).close()


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match=r"cannot be written \(Not a directory\)"):
        save(tmp_path / "file" / "run", 1)


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(PlanError, match=r"cannot be written \(No locks available\)"):
        save(tmp_path, 1)
