"""The generator itself: enough cases, each what it claims to be by the format's own reader."""

import json
from collections import Counter

import pytest
from safetensors import SafetensorError, safe_open

from hostile import CANARY, CASES

# The reader waits for ever on a FIFO and maps what it opens: only plain files are given to it.
JUDGED = [case for case in CASES if case.crate]
SOUND = [case for case in CASES if case.valid]


def read(path):
    with safe_open(path, "numpy") as file:
        return file.keys()


@pytest.mark.parametrize("case", JUDGED, ids=lambda case: case.name)
def test_the_format_s_reader_agrees_with_the_case(case, place):
    path = case.build(place)
    if case.crate == "rejects":
        with pytest.raises(SafetensorError):
            read(path)
    else:
        assert read(path) is not None


@pytest.mark.parametrize("case", SOUND, ids=lambda case: case.name)
def test_every_weight_file_of_a_sound_model_is_one_by_the_format(case, place):
    path = case.build(place)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    assert files
    assert all(read(file) for file in files)


@pytest.mark.parametrize("case", SOUND, ids=lambda case: case.name)
def test_the_index_of_a_sound_model_agrees_with_its_shards(case, place):
    path = case.build(place)
    for index in path.glob("*.index.json"):
        mapping = json.loads(index.read_text())["weight_map"]
        assert all(name in read(path / file) for name, file in mapping.items())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_building_a_case_runs_nothing_and_is_the_same_twice(case, place, tmp_path):
    again = tmp_path / "again"
    again.mkdir()
    first, second = case.build(place), case.build(again)
    assert first.relative_to(place) == second.relative_to(again)
    assert listing(place) == listing(again)
    assert not (place / CANARY).exists()


def listing(root):
    """Names and kinds of all that is below a directory."""
    return sorted((str(p.relative_to(root)), p.lstat().st_mode) for p in root.rglob("*"))


def test_names_are_unique():
    assert [name for name, count in Counter(case.name for case in CASES).items() if count > 1] == []


def test_there_are_enough_cases_of_every_group():
    groups = Counter(case.group for case in CASES)
    least = {"header": 100, "index": 30, "config": 30, "pickle": 10, "tokenizer": 20, "layout": 30}
    assert {name: groups[name] for name in least if groups[name] < least[name]} == {}
    assert groups["control"] >= 20


def test_every_control_is_sound_and_every_other_group_has_what_is_refused():
    assert all(case.valid for case in CASES if case.group == "control")
    groups = {case.group for case in CASES} - {"control", "code"}
    assert groups == {case.group for case in CASES if case.refused_by}
