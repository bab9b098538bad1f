"""A teacher that is trained on the data first."""

from __future__ import annotations

import json

import pytest

from cli.main import main
from healing import load, tensors
from recovering import BASE, FIXTURES, ask_of, losses, recovered, words
from surgery.errors import RecipeError
from surgery.recover.ask import check_ask
from surgery.recover.sources import Source

NEW = FIXTURES / "heldout" / "arith.jsonl"  # what the teacher knows little of
ASK = {"teacher": str(BASE), "data": (Source(NEW),), "correct_teacher": 6 * 256}


def test_the_corrected_teacher_knows_the_data_better_and_teaches(student, tmp_path) -> None:
    out = tmp_path / "out"
    recovered(student("pruned"), out, held_out=(NEW,), **ASK)
    folder = tmp_path / "out.surgery-run"
    assert len(losses(folder / "teacher")) == 6
    told = json.loads((folder / "teacher" / "surgery.json").read_text())["facts"]
    assert told["held_out"]["after"] < told["held_out"]["before"]
    assert not any(load(folder / "teacher")[1].values())
    plain = tmp_path / "plain"
    recovered(student("pruned"), plain, **{**ASK, "correct_teacher": 0})
    assert losses(out) != losses(plain)
    by_hand = tmp_path / "by_hand"
    recovered(student("pruned"), by_hand,
              **{**ASK, "correct_teacher": 0, "teacher": str(folder / "teacher")})  # fmt: skip
    assert losses(out) == losses(by_hand)


def test_a_run_that_goes_on_corrects_once(student, tmp_path) -> None:
    out = tmp_path / "out"
    options = {**ASK, "schedule": "constant"}
    recovered(student("pruned"), out, tokens=4 * 256, **options)
    teacher = tmp_path / "out.surgery-run" / "teacher" / "model.safetensors"
    before = teacher.stat().st_mtime_ns
    whole = tmp_path / "whole"
    recovered(student("pruned"), out, force=True, **options)
    assert teacher.stat().st_mtime_ns == before
    recovered(student("pruned"), whole, **options)
    assert losses(out) == losses(whole)


def test_another_amount_corrects_anew(student, tmp_path) -> None:
    out = tmp_path / "out"
    recovered(student("pruned"), out, **ASK)
    teacher = tmp_path / "out.surgery-run" / "teacher"
    before = tensors(teacher)
    more = {**ASK, "correct_teacher": 8 * 256}
    recovered(student("pruned"), out, force=True, resume=False, **more)
    after = tensors(teacher)
    assert any(bool((after[name] != before[name]).any()) for name in before)


def test_there_has_to_be_a_teacher_to_correct(student, tmp_path) -> None:
    with pytest.raises(RecipeError, match="--correct-teacher: trains a teacher that runs along"):
        check_ask(ask_of(student("pruned"), tmp_path / "out", correct_teacher=256))


def test_the_command_takes_it(student, tmp_path, capsys) -> None:
    line = words(student("pruned"), tmp_path / "out", "--teacher", str(BASE), "--loss", "kl=1",
                 "--correct-teacher", "1K", "--dry-run")  # fmt: skip
    assert main(line) == 0, capsys.readouterr().err
