"""What the tests of recipes share."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from safetensors.torch import save_file

from cli.main import main

sys.path.insert(0, str(Path(__file__).parent))
from recipes import SHAPES


@dataclass(frozen=True)
class Answer:
    """What a command line gave: exit code, standard output and error."""

    code: int
    out: str
    err: str


@pytest.fixture
def surgery(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Run a command line in this process."""

    def call(*words: object) -> Answer:
        capsys.readouterr()
        code = main([str(word) for word in words])
        told = capsys.readouterr()
        return Answer(code, told.out, told.err)

    return call


@pytest.fixture
def merged(surgery: Callable[..., Answer], tmp_path: Path) -> Callable[[str], Path]:
    """Run a recipe and return the output."""

    def call(text: str, out: str = "out.safetensors") -> Path:
        recipe = tmp_path / f"{out}.yml"
        recipe.write_text(dedent(text))
        answer = surgery("run", recipe, "-o", tmp_path / out)
        assert answer.code == 0, answer.err
        return tmp_path / out

    return call


@pytest.fixture
def flat(tmp_path: Path) -> Callable[..., Path]:
    """Write a bare model of five layers whose every weight is one number."""

    def write(name: str, value: float, **changes: object) -> Path:
        path = tmp_path / f"{name}.safetensors"
        tensors = {name: torch.full(shape, value) for name, shape in SHAPES.items()}
        tensors |= changes
        save_file({k: v for k, v in tensors.items() if v is not None}, path)
        return path

    return write
