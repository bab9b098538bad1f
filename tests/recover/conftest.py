"""Students of the trained fixtures, made once."""

from __future__ import annotations

from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from cli.main import main
from recovering import BASE

MADE = {
    "pruned": ["prune", str(BASE), "--layers", "2"],
    "tied": ["recurse", "tie", str(BASE), "--blocks", "2"],
    "relaxed": ["recurse", "relax", str(BASE), "--blocks", "2", "--rank", "4"],
    "sparse": ["sparsify", str(BASE), "--method", "magnitude", "--sparsity", "0.5"],
    "upcycled": ["upcycle", str(BASE), "--experts", "2", "--top-k", "2"],
    "expanded": ["expand", str(BASE), "--blocks", "2"],
    "stacked": ["stack", str(BASE), "--factor", "4"],
}


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory):
    """A student of `fixtures/base` by what was done to it; read it, never write to it."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            out = tmp_path_factory.mktemp("students") / name
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                assert main([*MADE[name], "-o", str(out)]) == 0
            made[name] = out
        return made[name]

    return get
