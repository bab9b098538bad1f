"""The tour runs to its end, twice, and what it leaves is what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.main import main


def test_the_tour_ends_well_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0
    told = capsys.readouterr().out
    assert "word for word as its parent" in told
    assert "not what its parent writes" in told
    assert "reproduced: 56 tensors identical" in told
    typed = [line.strip() for line in told.split("to repeat any step:")[1].splitlines()[1:]]
    assert len(typed) == 22
    assert "v2-with-uni" in told
    assert all(main(line.split()[1:]) == 0 for line in typed[:10])


def test_a_tour_that_cannot_write_says_so(tmp_path: Path, capsys) -> None:
    (tmp_path / "taken").write_text("a file")
    assert main(["demo", "-o", str(tmp_path / "taken")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_a_tour_does_not_touch_a_folder_that_is_not_its_own(tmp_path: Path, capsys) -> None:
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "models" / "base" / "model.safetensors").write_text("mine")
    assert main(["demo", "-o", str(tmp_path / "models")]) == 1
    assert "no tour has left there" in capsys.readouterr().err
    assert (tmp_path / "models" / "base" / "model.safetensors").read_text() == "mine"
