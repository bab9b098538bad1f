"""The generated page of every method: complete, and its example runs."""

import sys
from pathlib import Path

import pytest

from cli.main import main
from surgery.method import find_method, method_names

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import methods  # noqa: E402 - found through the line above

NAMES = method_names()


@pytest.mark.parametrize("name", NAMES)
def test_a_page_has_formula_parameters_source_cost_and_example(name):
    text = methods.page(find_method(name))
    for needed in ("$$", "## Source", "http", "## Parameters", "## Cost", "## Example"):
        assert needed in text, needed
    for parameter in find_method(name).parameters.values():
        assert parameter.bounds.help, parameter.name


@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs_on_the_fixtures(tmp_path, name, capsys):
    words = methods.example(find_method(name))[1:]
    words = [str(ROOT / word) if word.startswith("fixtures/") else word for word in words]
    words[-1] = str(tmp_path / "merged")
    assert main(words) == 0, capsys.readouterr().err
    assert main(["verify", words[-1]]) == 0, capsys.readouterr().out
