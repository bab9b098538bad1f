"""The trained fixtures, and short held-out text of two kinds."""

from __future__ import annotations

from pathlib import Path

import pytest

FIXTURES = Path(__file__).parents[2] / "fixtures"
MODELS = {name: str(FIXTURES / name) for name in ("base", "uni", "arith", "v2")}


@pytest.fixture(scope="session")
def models() -> dict[str, str]:
    """The trained models by name."""
    return MODELS


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Sixteen held-out documents each of names and of sums, in two files."""
    folder = tmp_path_factory.mktemp("text")
    for domain in ("uni", "arith"):
        lines = (FIXTURES / "heldout" / f"{domain}.jsonl").read_text("utf-8").splitlines()
        (folder / f"{domain}.jsonl").write_text("\n".join(lines[:16]) + "\n", "utf-8")
    return [str(folder / f"{domain}.jsonl") for domain in ("uni", "arith")]


@pytest.fixture(scope="session")
def bits(tmp_path_factory: pytest.TempPathFactory, texts: list[str]):
    """Bits per byte of the soup that `surgery soup` writes of models, by `surgery eval`: overall
    and on each text; a soup of one is the model itself."""
    from functools import cache

    from cli.main import main
    from surgery.evaluate import evaluate

    @cache
    def measured(*names: str) -> list[float]:
        place = MODELS[names[0]]
        if names[1:]:
            place = str(tmp_path_factory.mktemp("soup") / "out")
            assert main(["soup", *(MODELS[name] for name in names), "-o", place]) == 0
        found = evaluate([place], texts, bootstrap=1).models[0]
        return [figures.bits_per_byte for figures in (found.overall, *found.domains)]

    return measured
