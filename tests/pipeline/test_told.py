"""What a plan notes and what its steps find out is told by a pipeline as by the command alone."""

import json
from pathlib import Path

from cli.main import main

TEXT = "steps:\n  loop: {command: recurse relax, base: a, blocks: 2, rank: 2}\n"


def test_notes_and_figures_go_to_stderr_with_the_steps_name(here: Path, capsys) -> None:
    Path("p.yml").write_text(TEXT)
    assert main(["run", "p.yml"]) == 0
    told = capsys.readouterr()
    assert "of the model's parameters" in told.err
    assert all(line.startswith("loop: ") for line in told.err.splitlines())
    assert "share kept (energy) in all: " in told.out


def test_the_json_has_them_by_step(here: Path, capsys) -> None:
    Path("p.yml").write_text(TEXT)
    assert main(["run", "p.yml", "--json"]) == 0
    told = capsys.readouterr()
    step = json.loads(told.out)["steps"][0]
    assert any("of the model's parameters" in note for note in step["notes"])
    assert 0 < step["energy_in_all"] < 1
    assert step["told"]
    assert "parameters" not in told.err
