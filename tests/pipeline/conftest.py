"""What the pipeline's tests share: two tiny models and a file of steps."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import tiny


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of runs, each of which syncs its files."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture
def here(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the models `a` and `b`."""
    monkeypatch.chdir(scratch)
    tiny.write(scratch / "a")
    tiny.write(scratch / "b", seed=1)
    return scratch
