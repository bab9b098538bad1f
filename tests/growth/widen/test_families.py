"""Every family that is named as exact is: each is built small by transformers and widened."""

from __future__ import annotations

import pytest
import transformers
from layer_oracle import logits
from test_zoo import _load, small

from growth.widen import widen
from growth.widen.families import EXACT, TIED_UNTOLD
from surgery.checkpoint import open_checkpoint
from surgery.run import run

ASKS = (
    {"factor": 2},
    {"factor": 3, "noise": 0.3},
    {"to": 64},
    {"to": 32, "intermediate_size": 384},
)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(EXACT))
def test_a_family_computes_the_same_when_widened(family, tmp_path):
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip("not in this version of transformers")
    model = small(family, tmp_path / "base")
    assert model is not None
    for number, ask in enumerate(ASKS):
        plan = widen(open_checkpoint(tmp_path / "base"), **ask)
        wide = _load(run(plan, tmp_path / f"{number}").out)
        assert (logits(wide) - logits(model)).abs().max() <= 1e-5, ask


@pytest.mark.parametrize("family", sorted(EXACT))
def test_a_tie_that_a_config_leaves_out_is_what_transformers_takes(family):
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip("not in this version of transformers")
    made = transformers.CONFIG_MAPPING[family]()
    assert bool(getattr(made, "tie_word_embeddings", False)) == (family in TIED_UNTOLD)
