"""Write factored models, each once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from factor_models import FIXTURES, TEXT


@pytest.fixture(scope="session")
def halves(tmp_path_factory):
    """Every other document of the held-out text, to measure on, and the rest, to judge by."""
    folder, lines = tmp_path_factory.mktemp("text"), TEXT.read_text().splitlines(keepends=True)
    places = folder / "first.jsonl", folder / "second.jsonl"
    for place, own in zip(places, (lines[::2], lines[1::2]), strict=True):
        place.write_text("".join(own))
    return places


@pytest.fixture(scope="session")
def statistics(tmp_path_factory, halves):
    """Gram matrices of the trained fixture's inputs."""
    from surgery.calibrate import calibrate
    from surgery.checkpoint import open_checkpoint

    out = tmp_path_factory.mktemp("statistics") / "base.safetensors"
    calibrate(FIXTURES / "base", [halves[0]], out, collect=("grams",), samples=48)
    return open_checkpoint(out)


@pytest.fixture(scope="session")
def factored(opened, write, statistics):
    """A factored directory by structure (`base`: the trained fixture) and options, written once."""
    from growth.factor.plan import factor
    from surgery.checkpoint import open_checkpoint

    made = {}

    def get(name, method, **asked):
        key = (name, method, *sorted(asked.items()))
        if key not in made:
            base = open_checkpoint(FIXTURES / "base") if name == "base" else opened(name)
            beside = statistics if name == "base" else None
            made[key] = write(factor(base, beside, method=method, **asked))
        return made[key]

    return get
