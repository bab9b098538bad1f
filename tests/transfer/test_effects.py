"""On the trained fixtures: the recipes of docs/transfer.md do what the page says."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from surgery.checkpoint import open_checkpoint
from surgery.evaluate import evaluate
from surgery.run import run
from surgery.transfer import transfer


@pytest.fixture(scope="module")
def moved(fixtures_dir, tmp_path_factory):
    """Run transfers of the fixtures, each once: (new base, tuned, old base) by name or path."""
    made = {}

    def move(*names, **options):
        key = (*names, *options.items())
        if key not in made:
            paths = [made.get(name, fixtures_dir / str(name)) for name in names]
            plan = transfer(*map(open_checkpoint, paths), **options)
            made[key] = run(plan, tmp_path_factory.mktemp("moved") / "out").out
        return made[key]

    return move


@pytest.fixture(scope="module")
def change(fixtures_dir):
    """Bits per byte of a model less those of its parent, on held-out text of a domain."""

    def measure(model, parent, domain):
        text = fixtures_dir / "heldout" / f"{domain}.jsonl"
        found = evaluate([fixtures_dir / parent, model], [text], batch_tokens=4096)
        return found.models[1].overall.difference

    return measure


@pytest.mark.parametrize(("tuned", "domain"), [("uni", "uni"), ("arith", "arith")])
def test_a_difference_moved_to_v2_gives_it_the_domain(tuned, domain, moved, change) -> None:
    found = change(moved("v2", tuned, "base"), "v2", domain)
    assert found.bits_per_byte < -1.0
    assert found.high < 0


def test_half_of_the_difference_gives_a_part_of_it(moved, change) -> None:
    whole = change(moved("v2", "uni", "base"), "v2", "uni")
    half = change(moved("v2", "uni", "base", ratio=0.5), "v2", "uni")
    assert whole.bits_per_byte < half.bits_per_byte < -0.5


def test_a_negative_ratio_takes_the_domain_away(moved, change) -> None:
    found = change(moved("base", "uni", "base", ratio=-0.5), "base", "uni")
    assert found.bits_per_byte > 0.5
    assert found.low > 0


def test_without_the_embeddings_it_still_carries_over(moved, change) -> None:
    found = change(moved("v2", "uni", "base", skip_embeddings=True), "v2", "uni")
    assert found.bits_per_byte < -0.5
    assert found.high < 0


def test_recycling_leads_back_to_the_expert(moved, fixtures_dir) -> None:
    forth = moved("v2", "uni", "base")
    back = run(
        transfer(
            *(open_checkpoint(p) for p in (fixtures_dir / "base", forth, fixtures_dir / "v2"))
        ),
        forth.parent / "back",
    ).out
    found, expert = (load_file(p / "model.safetensors") for p in (back, fixtures_dir / "uni"))
    for name, tensor in found.items():
        error = (tensor.double() - expert[name].double()).norm() / expert[name].double().norm()
        assert error < 0.005, name
