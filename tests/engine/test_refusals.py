"""Outputs that exist, that touch an input, or that cannot be written are refused, untouched."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import tiny

from growth.stack import stack
from surgery.checkpoint import open_checkpoint
from surgery.errors import PlanError
from surgery.run import run

REPO = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "surgery"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPO)}


def test_an_existing_output_is_refused_and_an_empty_folder_is_not(
    base: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    run(tiny.stacked(base), tmp_path / "out")
    before = tiny.tree(tmp_path / "out")
    with pytest.raises(PlanError, match=r"exists already.*--force"):
        run(tiny.stacked(base), tmp_path / "out")
    assert tiny.tree(tmp_path / "out") == before


def test_force_does_not_replace_what_is_no_model(base: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(PlanError, match="something else than a model"):
        run(tiny.stacked(base), tmp_path / "thesis", force=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_force_on_a_link_replaces_the_link_and_not_what_it_leads_to(
    base: Path, tmp_path: Path
) -> None:
    other = tiny.write(tmp_path / "other", seed=1)
    before = tiny.tree(other)
    (tmp_path / "link").symlink_to(other)
    run(tiny.stacked(base), tmp_path / "link", force=True)
    assert not (tmp_path / "link").is_symlink()
    assert tiny.tree(other) == before


def alias(kind: str, base: Path, tmp_path: Path) -> Path:
    if kind == "same":
        return base
    if kind == "inside":
        return base / "out"
    if kind == "around":
        return base.parent
    link = tmp_path / "elsewhere" / "link"
    link.parent.mkdir()
    link.symlink_to(base)
    return link if kind == "link" else link / "out"


@pytest.mark.parametrize("kind", ["same", "inside", "around", "link", "inside a link"])
@pytest.mark.parametrize("force", [False, True])
def test_an_output_that_touches_an_input_is_refused(tmp_path: Path, kind: str, force: bool) -> None:
    base = tiny.write(tmp_path / "models" / "base")
    before = tiny.tree(tmp_path / "models")
    with pytest.raises(PlanError, match=r"is the input|inside the input|holds the input"):
        run(tiny.stacked(base), alias(kind, base, tmp_path), force=force)
    assert tiny.tree(tmp_path / "models") == before


@pytest.mark.parametrize("link", ["same", "symlink_to", "hardlink_to"])
def test_a_bare_output_that_is_the_input_is_refused(tmp_path: Path, link: str) -> None:
    source = tiny.sparse(tmp_path / "base.safetensors", 2, 1)
    out = source
    if link != "same":
        out = tmp_path / "other.safetensors"
        getattr(out, link)(source)
    with pytest.raises(PlanError, match="is the input"):
        run(stack(open_checkpoint(source), factor=2), out, force=True)


@pytest.mark.parametrize(
    ("out", "told"),
    [
        ("missing/out", "does not exist"),
        ("out.safetensors", "output of a directory is a directory"),
    ],
)
def test_an_impossible_output_is_refused_in_one_sentence(
    base: Path, tmp_path: Path, out: str, told: str
) -> None:
    with pytest.raises(PlanError, match=told):
        run(tiny.stacked(base), tmp_path / out)


def test_a_read_only_file_system_is_told_in_one_sentence(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    plan = tiny.stacked(base)
    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(PlanError, match=r"cannot be written .Read-only file system"):
        run(plan, tmp_path / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_told_in_one_sentence(base: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(PlanError, match="cannot be written"):
        run(tiny.stacked(base), tmp_path / "locked" / "out")


def test_too_little_disk_is_told_before_the_first_byte(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(PlanError, match=r"needs .* of disk, but .* are free"):
        run(tiny.stacked(base), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("stray", ["optimizer.pt", "runs/log.txt"])
def test_force_does_not_replace_a_model_beside_which_other_work_lies(
    base: Path, tmp_path: Path, stray: str
) -> None:
    run(tiny.stacked(base), tmp_path / "mine")
    (tmp_path / "mine" / stray).parent.mkdir(exist_ok=True)
    (tmp_path / "mine" / stray).write_text("days of work")
    with pytest.raises(PlanError, match=r"no part of a model and would be lost"):
        run(tiny.stacked(base), tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / stray).read_text() == "days of work"
