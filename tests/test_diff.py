"""`surgery diff`: what it prints for people and programs, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from cli import render
from cli.diff import collapse
from cli.main import main
from pairs import FIGURES, layered, make_strangers, parent_and_child, shown, write


@pytest.fixture
def models(tmp_path):
    return parent_and_child(tmp_path)


GROUP = {"tensors", "identical", "unmeasured", "norm_a", "norm_b", *FIGURES}
TENSOR = {"name", "layer", "module", "part", "dtype_a", "dtype_b", "state", "note", "shape"}


def test_the_keys_of_the_json_stay(models, capsys):
    found = json.loads(shown(capsys, *models, "--json"))
    assert set(found) == {
        "a", "b", "identical", "total", "parts", "layers", "modules", "cells", "tensors",
        "only_in_a", "only_in_b", "mismatched", "notes",
    }  # fmt: skip
    assert set(found["a"]) == {
        "ref", "name", "family", "tensors", "parameters", "bytes", "dtypes"
    }  # fmt: skip
    assert set(found["total"]) == GROUP
    assert set(found["layers"][0]) == GROUP | {"layer"}
    assert set(found["parts"][0]) == GROUP | {"part"}
    assert set(found["cells"][0]) == GROUP | {"layer", "module"}
    assert set(found["tensors"][0]) == TENSOR | (GROUP - {"tensors", "identical", "unmeasured"})


def test_the_json_holds_no_number_that_json_has_not(tmp_path, capsys):
    a = write(tmp_path / "a.safetensors", {"t": torch.zeros(2), "u": torch.tensor([float("nan")])})
    b = write(tmp_path / "b.safetensors", {"t": torch.ones(2), "u": torch.ones(1)})
    text = shown(capsys, a, b, "--json")
    assert json.loads(text, parse_constant=pytest.fail)["tensors"][0]["relative_l2"] is None


def test_piped_the_map_is_numbers(models, capsys):
    text = shown(capsys, *models)
    header = next(line for line in text.splitlines() if line.startswith("relative L2 of layer"))
    assert header.split()[4:] == ["self_attn.q_proj", "mlp.experts.*.up"]
    rows = text[text.index(header) :].splitlines()[1:4]
    assert [row.split()[0] for row in rows] == ["0", "1", "2"]
    assert rows[0].split()[1:] == ["0", "0"]
    assert "\x1b" not in text


def test_identical_models_are_one_line_of_verdict(models, capsys):
    text = shown(capsys, models[0], models[0])
    assert "identical: all 11 tensors have the same bytes" in text
    assert text.count("\n") == 3


@pytest.mark.parametrize(("asked", "count"), [("2", 2), ("0", 0), ("all", 11), ("99", 4)])
def test_as_many_tensors_are_listed_as_asked(asked, count, models, capsys):
    text = shown(capsys, *models, "--tensors", asked)
    assert sum(line.startswith("model.") for line in text.splitlines()) == count


@pytest.fixture
def strangers(tmp_path):
    return make_strangers(tmp_path)


STRANGE = {
    "counts of what is apart": "204 only in B, 1 of another shape, 2 differ, but",
    "a name for many": "model.layers.{2-59}.mlp.experts.{0-1}.up.weight 116",
    "shapes": "model.norm.weight [4] [5]",
    "both dtypes": "lm_head.weight F32, BF16",
    "why not": "I64 is compared by bytes only",
    "how many are left": "and 12 more (--json lists them)",
}


@pytest.mark.parametrize("words", STRANGE.values(), ids=STRANGE)
def test_what_is_apart_is_printed(words, strangers, capsys):
    assert words in " ".join(shown(capsys, *strangers, "--tensors", "all").split())


@pytest.fixture
def terminal(monkeypatch):
    """A console that takes its output for a terminal of 60 columns."""

    def make(**environment):
        for name, value in ({"FORCE_COLOR": "1", "COLUMNS": "60"} | environment).items():
            monkeypatch.setenv(name, value)
        render._console.cache_clear()

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    yield make
    render._console.cache_clear()


def test_on_a_terminal_the_map_is_coloured_blocks(models, terminal, capsys):
    terminal()
    text = shown(capsys, *models)
    row = next(line for line in text.splitlines() if line.startswith("self_attn.q_proj  "))
    assert row.count("\u2588") == 2
    assert row.count("\u00b7") == 4
    assert "\x1b[38" in row


def test_without_colour_the_map_is_shades(models, terminal, capsys):
    terminal(NO_COLOR="1")
    text = shown(capsys, *models)
    assert "\u2591" in text
    assert "\x1b[38" not in text


def test_a_map_wider_than_the_terminal_is_broken_into_blocks(tmp_path, terminal, capsys):
    terminal()
    a = write(tmp_path / "a.safetensors", layered(layers=90))
    b = write(tmp_path / "b.safetensors", layered(layers=90, noise=1.0))
    text = shown(capsys, a, b)
    rows = [line for line in text.splitlines() if line.startswith("self_attn.q_proj  ")]
    assert len(rows) == 3


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.0.w", "a.1.w", "a.3.w"], [("a.{0-1, 3}.w", 3)]),
        (["a.0.e.0.w", "a.0.e.1.w"], [("a.0.e.{0-1}.w", 2)]),
        (["a.7.w"], [("a.7.w", 1)]),
        (["plain", "odd{}.1.w"], [("plain", 1), ("odd{}.1.w", 1)]),
        (["a.0.w", "a.0.v"], [("a.0.w", 1), ("a.0.v", 1)]),
    ],
)
def test_names_that_differ_in_numbers_are_written_as_one(names, expected):
    assert collapse(names) == expected


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{a}", "nowhere"], 1, "does not exist"),
        (["{a}"], 2, "Missing argument"),
        (["{a}", "{a}", "--tensors", "some"], 2, "is not a number"),
        (["{a}", "{a}", "--memory", "much"], 2, "is not a size"),
        (["{a}", "{a}", "--memory", "2M"], 1, "less than one thread needs"),
        (["{a}", "{a}", "--workers", "0"], 2, "--workers"),
        (["{a}", "{a}", "--html", "{a}"], 1, "exists"),
        (["{a}", "{a}", "--html", "{a}", "--force"], 1, "is one of the inputs"),
        (["{a}", "{a}", "--html", "{dir}"], 1, "is a directory"),
        (["{a}", "{a}", "--html", "{dir}/no/x.html"], 1, "does not exist"),
    ],
)
def test_wrong_use_is_one_sentence(arguments, code, words, models, capsys):
    places = {"a": models[0], "dir": models[0].parent}
    assert main(["diff", *(text.format(**places) for text in arguments)]) == code
    seen = capsys.readouterr()
    assert words in seen.err
    assert seen.err.count("\n") == 1
    assert seen.out == ""


PROBE = """
import sys
from cli.main import main
code = main(["diff", *sys.argv[1:]])
print("torch" in sys.modules, file=sys.stderr)
"""


def test_a_wrong_input_is_refused_without_torch(models):
    words = [sys.executable, "-c", PROBE, str(models[0]), "nowhere"]
    done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == "False"
