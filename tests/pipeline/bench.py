"""A pipeline of three kinds of steps, and what running it says and leaves."""

from __future__ import annotations

import json
from pathlib import Path

from cli.main import main

STEPS = """
steps:
  soup:
    command: soup
    models: [a, b]
  deep:
    command: stack
    base: soup
    factor: {factor}
  shallow:
    command: prune
    base: deep
    layers: {layers}
  check:
    command: verify
    path: shallow
    load: false
"""


def write(text: str = STEPS, *, factor: int = 2, layers: str = "0", name: str = "p.yml") -> str:
    """Write the pipeline into the working directory and return its name."""
    Path(name).write_text(text.replace("{factor}", str(factor)).replace("{layers}", layers))
    return name


def run(capsys, *words: str, code: int = 0) -> dict[str, dict]:
    """Run `p.yml` and return what was done by step."""
    assert main(["run", "p.yml", "--json", *words]) == code
    return {one["step"]: one for one in json.loads(capsys.readouterr().out)["steps"]}


def states(capsys, *words: str) -> dict[str, str]:
    """Run `p.yml` and return the state of each step."""
    return {name: one["state"] for name, one in run(capsys, *words).items()}


def refused(capsys, *words: str, code: int = 2) -> str:
    """Run `p.yml`, which must fail, and return what is said."""
    assert main(["run", "p.yml", *words]) == code
    return capsys.readouterr().err


FIRST = {"soup": "made", "deep": "made", "shallow": "made", "check": "measured"}
IDLE = dict.fromkeys(FIRST, "skipped")
