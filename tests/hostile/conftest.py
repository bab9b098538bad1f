"""Make the generator of hostile inputs importable, and give each case a directory of its own."""

import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
sys.path.append(str(REPO / "fixtures"))  # last: nothing there may hide a library


@pytest.fixture
def place(tmp_path):
    """A directory for a case, and nothing else in it."""
    made = tmp_path / "case"
    made.mkdir()
    return made
