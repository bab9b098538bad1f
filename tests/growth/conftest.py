"""Make the oracle of moved layers importable, and share what is costly to write and load."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def opened(structure):
    """A structure fixture, opened, by its name."""
    from surgery.checkpoint import open_checkpoint

    return lambda name: open_checkpoint(structure(name))


@pytest.fixture(scope="session")
def parent(structure):
    """A structure fixture, loaded by transformers, by its name."""
    from structures import load

    loaded = {}

    def get(name):
        if name not in loaded:
            loaded[name] = load(name, structure(name))[0]
        return loaded[name]

    return get


@pytest.fixture(scope="session")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run a plan into a new directory and return it."""
    from surgery.run import run

    def write(plan, name: str = "out") -> Path:
        return run(plan, tmp_path_factory.mktemp("grown") / name).out

    return write
