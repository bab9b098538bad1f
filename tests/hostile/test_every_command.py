"""Every case through every command: one clear sentence or success, and nothing else happens."""

import os
import signal
from contextlib import contextmanager

import pytest
from hostile.case import NOT_INSPECT
from safetensors import safe_open

from hostile import CANARY, CASES, COMMANDS

main = pytest.importorskip("cli.main").main

SECONDS = 20
LINES = 5
LETTERS = 2_000  # of a message, the path's own length apart
REFUSALS = {1, 2, 3}
RUNS = [
    pytest.param(case, command, id=f"{command}: {case.name}")
    for case in CASES
    for command in COMMANDS
]
TEMPLATES = [case for case in CASES if case.name.startswith("chat template")]


class TooLate(BaseException):
    """The command did not end in time; no handler of the command's own may catch it."""


@contextmanager
def deadline(seconds):
    def stop(*_):
        raise TooLate(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def arguments(command, path, out):
    more = {"inspect": [], "verify": ["--no-load"], "stack": ["--factor", "2", "-o", str(out)]}
    return [command, str(path), *more[command]]


def run(command, path, out):
    """Run a command inside this process and return its exit code."""
    with deadline(SECONDS):
        try:
            return main(arguments(command, path, out))
        except SystemExit as error:
            return error.code


def state(root):
    """What lies below a directory: names, kinds, sizes and times of last change."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            stat = os.lstat(os.path.join(folder, name))  # noqa: PTH118 - any name at all
            found[folder, name] = (stat.st_mode, stat.st_size, stat.st_mtime_ns)
    return found


def skip_unless_it_can_fail(case):
    if os.geteuid() == 0 and not case.as_root:
        pytest.skip("the super-user may read everything")


def clean(text):
    """No character that drives a terminal, but for colour, which only we may use."""
    return all(c.isprintable() or c in "\n\t" for c in text)


@pytest.mark.parametrize(("case", "command"), RUNS)
def test_ends_as_it_must(case, command, place, tmp_path, capsys):
    skip_unless_it_can_fail(case)
    path = case.build(place)
    bare = os.path.isfile(path)  # noqa: PTH113 - Path raises on a name that is too long
    out = tmp_path / "out" / ("made.safetensors" if bare else "made")
    out.parent.mkdir()
    before = state(place)

    code = run(command, path, out)

    stdout, stderr = capsys.readouterr()
    told = f"exit code {code}\n{stdout}\n{stderr}"
    outcome = case.outcome(command)
    assert state(place) == before, "the input was changed"
    assert not (place / CANARY).exists(), "code of the checkpoint was run"
    assert "Traceback" not in stdout + stderr
    assert "fault in surgery" not in stderr, told
    assert clean(stdout + stderr), told
    assert code in {0, *REFUSALS}, told
    if outcome != "clean":
        assert (code == 0) == (outcome == "success"), told
    if code == 0:
        assert [p for p in out.parent.iterdir() if p != out] == []
        assert out.exists() == (command == "stack")
        if command == "inspect" and case.refused_by == NOT_INSPECT:
            assert "note: " in stdout + stderr, told
        return
    assert list(out.parent.iterdir()) == [], "something was written"
    assert stderr.strip(), told
    assert len(stderr.splitlines()) <= LINES, told
    assert len(stderr) <= LETTERS + 2 * len(str(path)), told
    if outcome == "refusal":
        flat = " ".join(stderr.split()).lower()
        assert [word for word in case.mentions if word.lower() not in flat] == [], told


@pytest.mark.parametrize("case", TEMPLATES, ids=lambda case: case.name)
def test_a_template_is_carried_as_bytes(case, place, tmp_path):
    path = case.build(place)
    assert run("stack", path, tmp_path / "made") == 0
    carried = "chat_template.jinja"
    assert (tmp_path / "made" / carried).read_bytes() == (path / carried).read_bytes()


SOUND_FILES = [case for case in CASES if case.valid and case.crate]


@pytest.mark.parametrize("case", SOUND_FILES, ids=lambda case: case.name)
def test_a_stacked_file_is_sound_and_keeps_the_odd_tensors(case, place, tmp_path):
    path = case.build(place)
    out = tmp_path / "made.safetensors"
    assert run("stack", path, out) == 0
    with safe_open(path, "numpy") as source, safe_open(out, "numpy") as made:
        odd = {name for name in source.keys() if "layers." not in name}  # noqa: SIM118
        assert odd <= set(made.keys())
        kept = {name: (made.get_slice(name), source.get_slice(name)) for name in odd}
        assert all(
            (a.get_dtype(), a.get_shape()) == (b.get_dtype(), b.get_shape())
            for a, b in kept.values()
        )


WHOLE = {
    "one weight file": 0,
    "two shards": 0,
    "tied, no lm_head": 0,
    "rotary frequencies stored": 0,
    "a layer lacks a tensor": 3,
    "untied, and no lm_head": 3,
    "code of another repository": 0,  # said to be skipped, since it is not run
}


@pytest.mark.parametrize(("name", "expected"), WHOLE.items())
def test_verifying_with_transformers_finds_what_is_missing(name, expected, place, tmp_path, capsys):
    case = next(case for case in CASES if case.name == name)
    path = case.build(place)
    with deadline(10 * SECONDS):  # the first one imports torch
        code = main(["verify", str(path)])
    told = capsys.readouterr()
    assert code == expected, told
    assert "fault in surgery" not in told.err
    assert not (place / CANARY).exists()


PICKLES = [case for case in CASES if case.group == "pickle"]


@pytest.mark.parametrize("case", PICKLES, ids=lambda case: case.name)
def test_converting_a_bad_pickle_runs_and_writes_nothing(case, place, tmp_path, capsys):
    path = case.build(place)
    out = tmp_path / "out" / "made"
    out.parent.mkdir()
    with deadline(10 * SECONDS):
        code = main(["convert", str(path), "-o", str(out)])
    stderr = capsys.readouterr().err
    assert code in {1, 2}
    assert "fault in surgery" not in stderr
    assert 1 <= len(stderr.splitlines()) <= LINES
    assert not (place / CANARY).exists()
    assert list(out.parent.iterdir()) == []
