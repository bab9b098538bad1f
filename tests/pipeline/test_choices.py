"""A step may have the name of a word that an option takes, and that word stays a word."""

from pathlib import Path

import pytest

from cli.main import main

CASES = [
    "  tied: {command: recurse tie, base: a, blocks: 2, format: dense}\n"
    "  more: {command: recurse tie, base: a, blocks: 2, format: tied}\n",
    "  dense: {command: recurse tie, base: a, blocks: 2, format: dense}\n",
    "  last:\n    command: stack\n    base: a\n    factor: 2\n"
    "  tail:\n    command: prune\n    base: last\n    method: tail\n    layers: 1\n",
]


@pytest.mark.parametrize("steps", CASES)
def test_a_fixed_choice_is_no_step(here: Path, steps: str) -> None:
    Path("p.yml").write_text("steps:\n" + steps)
    assert main(["run", "p.yml"]) == 0
    assert len(list(Path("p").glob("*/model.safetensors"))) == steps.count("command:")


def test_a_path_of_a_choices_name_is_not_in_its_way(here: Path) -> None:
    Path("tied").mkdir()
    steps = (
        "  tied: {command: stack, base: ./a, factor: 2}\n"
        "  b2: {command: recurse tie, base: a, blocks: 2, format: tied}\n"
    )
    Path("p.yml").write_text("steps:\n" + steps)
    assert main(["run", "p.yml"]) == 0


def test_an_option_with_two_names_has_both_as_keys(here: Path, capsys) -> None:
    steps = "  x: {command: prune, base: a, method: angular, layers: 1, %s: no.txt}\n"
    said = []
    for name in ("text", "calibration"):
        Path("p.yml").write_text("steps:\n" + steps % name)
        assert main(["run", "p.yml"]) == 2
        said.append(capsys.readouterr().err)
    assert "no.txt: is not there" in said[0]
    assert said[0] == said[1]
