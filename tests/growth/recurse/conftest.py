"""Write recursive models, each once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from recurse_models import FULL, logits_of


@pytest.fixture(scope="session")
def stock_logits(parent):
    """The logits of a structure fixture, by its name."""
    return lambda name: logits_of(parent(name), name)


@pytest.fixture(scope="session")
def relaxed(opened, write):
    """A relaxed model's directory by structure and options, written once."""
    from growth.recurse.tying import relax

    made = {}

    def get(name, **asked):
        key = (name, *sorted(asked.items()))
        if key not in made:
            made[key] = write(relax(opened(name), **{"blocks": 2, "rank": FULL, **asked}))
        return made[key]

    return get


@pytest.fixture(scope="session")
def tied(opened, write):
    """A tied model's directory by structure and options, written once."""
    from growth.recurse.tying import tie

    made = {}

    def get(name, **asked):
        key = (name, *sorted(asked.items()))
        if key not in made:
            made[key] = write(tie(opened(name), **{"blocks": 2, **asked}))
        return made[key]

    return get
