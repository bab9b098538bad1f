"""What changes of shape do to trained models, in bits per byte of text that none of them saw."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from cli.main import main
from surgery.evaluate import evaluate

FIXTURES = Path(__file__).parents[1] / "fixtures"
BASE, TEXT = FIXTURES / "base", FIXTURES / "heldout" / "mix.jsonl"
RANKS = (4, 16, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("grown")


def made(folder: Path, name: str, *words: str) -> Path:
    out = folder / name
    if not out.exists():
        assert main([*words, "-o", str(out)]) == 0
    return out


def changes(parent: Path, *children: Path):
    found = evaluate([parent, *children], [TEXT])
    return [model.domains[0].difference for model in found.models[1:]]


@pytest.fixture(scope="module")
def recursive(folder):
    """Plainly tied, then relaxed at rising ranks."""
    recurse = ("recurse", "tie", str(BASE), "--blocks", "2")
    tied = made(folder, "tied", *recurse)
    return [
        tied,
        *(
            made(folder, f"rank{r}", "recurse", "relax", *recurse[2:], "--rank", str(r))
            for r in RANKS
        ),
    ]


def test_relaxed_recursion_loses_less_than_plain_tying_at_every_rank(recursive):
    for change in changes(recursive[0], *recursive[1:]):
        assert change.high < 0


def test_the_loss_of_relaxed_recursion_falls_with_its_rank(recursive):
    for lower, higher in pairwise(recursive):
        assert changes(lower, higher)[0].high < 0


def test_block_influence_loses_less_than_layers_at_random(folder):
    measured = ("--method", "block-influence", "--layers", "1", "--calibration", str(TEXT))
    chosen = made(folder, "chosen", "prune", str(BASE), *measured)
    others = [made(folder, f"without{n}", "prune", str(BASE), "--layers", str(n)) for n in range(4)]
    at_random = changes(BASE, *others)
    mean = sum(change.bits_per_byte for change in at_random) / len(at_random)
    assert changes(BASE, chosen)[0].high < mean


def test_making_up_for_zeros_loses_less_than_magnitude(folder):
    ask = ("sparsify", str(BASE), "--sparsity", "2:4", "--method")
    plain = made(folder, "magnitude", *ask, "magnitude")
    mended = made(folder, "sparsegpt", *ask, "sparsegpt", "--calibration", str(TEXT))
    assert changes(plain, mended)[0].high < 0
