"""What merging does to trained models, through the command line, on text none of them has seen.

The margins are those that hold with room on every seed that was trained (fixtures/README.md);
every claim is a paired difference whose interval, or margin, leaves zero out.
"""

from functools import cache
from pathlib import Path

import pytest

from cli.main import main
from surgery.evaluate import evaluate

FIXTURES = Path(__file__).parents[1] / "fixtures"
BASE, UNI, ARITH, V2 = (str(FIXTURES / name) for name in ("base", "uni", "arith", "v2"))
COMMANDS = {
    "soup": ["soup", UNI, ARITH],
    "ties": ["merge", "ties", UNI, ARITH, "--base", BASE, "--weight", "1", "--density", "0.5"],
    "base - uni": ["merge", "task_arithmetic", UNI, "--base", BASE, "--weight", "-0.5"],
    "base - arith": ["merge", "task_arithmetic", ARITH, "--base", BASE, "--weight", "-0.5"],
    "v2 + uni": ["transfer", "--old-base", BASE, "--tuned", UNI, "--new-base", V2],
    "v2 + arith": ["transfer", "--old-base", BASE, "--tuned", ARITH, "--new-base", V2],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Make every merge by its command; return all models by name."""
    folder = tmp_path_factory.mktemp("merged")
    found = {"base": BASE, "uni": UNI, "arith": ARITH, "v2": V2}
    for name, words in COMMANDS.items():
        found[name] = str(folder / name.replace(" ", ""))
        assert main([*words, "-o", found[name]]) == 0
    return found


@pytest.fixture(scope="module")
def change(models):
    """Return the paired difference in bits per byte of a model from another on a domain."""

    @cache
    def measured(child, parent, domain):
        text = FIXTURES / "heldout" / f"{domain}.jsonl"
        found = evaluate([models[parent], models[child]], [text])
        return found.models[1].overall.difference

    return measured


@pytest.mark.parametrize(
    ("child", "parent", "domain", "at_least"),
    [
        ("soup", "base", "uni", 1.0),
        ("soup", "base", "arith", 1.0),
        ("soup", "uni", "arith", 1.0),
        ("soup", "arith", "uni", 1.0),
        ("ties", "base", "uni", 1.0),
        ("ties", "base", "arith", 1.0),
        ("uni", "soup", "uni", 0.15),
        ("arith", "soup", "arith", 0.15),
        ("v2 + uni", "v2", "uni", 1.0),
        ("v2 + arith", "v2", "arith", 1.0),
    ],
)
def test_a_merge_is_better_than_its_parent(change, child, parent, domain, at_least):
    found = change(child, parent, domain)
    assert found.bits_per_byte < -at_least
    assert found.high < 0


@pytest.mark.parametrize(("child", "domain"), [("base - uni", "uni"), ("base - arith", "arith")])
def test_negation_hurts_its_target(change, child, domain):
    found = change(child, "base", domain)
    assert found.bits_per_byte > 1.0
    assert found.low > 0


@pytest.mark.parametrize(
    ("child", "at_most"),
    [("soup", 0.05), ("base - uni", 0.15), ("base - arith", 0.15)],
)
def test_the_base_domain_is_kept(change, child, at_most):
    assert change(child, "base", "mix").high < at_most
