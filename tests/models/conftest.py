"""Make the writer of tied directories importable."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tied(tmp_path_factory):
    """A tied directory by its family, plain or relaxed, written once."""
    from recursion import PLAIN, RELAXED, write

    made = {}

    def get(family, kind="plain"):
        key = family, kind
        if key not in made:
            ranks = RELAXED if kind == "relaxed" else PLAIN
            made[key] = write(family, tmp_path_factory.mktemp("tied"), ranks=ranks)
        return made[key]

    return get


@pytest.fixture(scope="session")
def recursive(tied):
    """The loaded model of a tied directory, for tests that leave it as it is."""
    from recursion import open_tied

    made = {}

    def get(family, kind="plain"):
        key = family, kind
        if key not in made:
            made[key] = open_tied(tied(family, kind).path)
        return made[key]

    return get
