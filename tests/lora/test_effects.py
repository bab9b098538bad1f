"""On the trained fixtures: an expert's difference as an adapter keeps what the expert learned."""

from __future__ import annotations

import pytest

from surgery.checkpoint import open_checkpoint
from surgery.checkpoint.adapter_source import open_adapter_source
from surgery.evaluate import evaluate
from surgery.lora.combine import merge
from surgery.lora.extract import extract
from surgery.lora.fuse import fuse


@pytest.fixture(scope="module")
def adapters(fixtures_dir, lab):
    """Both experts as adapters of rank 32, the rest of what differs held whole or left out."""

    def make(name, **options):
        base, tuned = (open_checkpoint(fixtures_dir / n) for n in ("base", name))
        return lab.write(extract(base, tuned, rank=32, **options), name)

    return make


@pytest.fixture(scope="module")
def change(fixtures_dir, lab):
    """Bits per byte of a base with an adapter, less those of the base."""

    def measure(base, adapter, domain):
        fused = lab.write(fuse(open_checkpoint(f"{fixtures_dir / base}+{adapter}")))
        text = fixtures_dir / "heldout" / f"{domain}.jsonl"
        found = evaluate([fixtures_dir / base, fused], [text], batch_tokens=4096)
        return found.models[1].overall.difference

    return measure


@pytest.mark.parametrize("base", ["base", "v2"])
def test_an_extracted_adapter_gives_a_base_the_domain(base, adapters, change) -> None:
    found = change(base, adapters("uni", modules_to_save=["norm"]), "uni")
    assert found.bits_per_byte < -0.5
    assert found.high < 0


def test_both_experts_merged_help_on_both_domains(adapters, change, lab) -> None:
    both = [open_adapter_source(adapters(name)) for name in ("uni", "arith")]
    merged = lab.write(merge(*both, weights=[0.7, 0.7], method="svd", rank=48))
    for domain in ("uni", "arith"):
        found = change("base", merged, domain)
        assert found.bits_per_byte < -0.3
        assert found.high < 0
