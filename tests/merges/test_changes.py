"""Methods that look at which weights changed, and by how much."""

from pathlib import Path

import numpy as np
import pytest
import torch

from laws.bench import Family
from surgery.apply import apply
from surgery.method import find_method

RAM, LOCAL, MAGMAX, FUSION, NEARSWAP = (
    find_method(n) for n in ("ram", "ramplus_tl", "magmax", "arcee_fusion", "nearswap")
)
BASE = torch.zeros(6, dtype=torch.float64)
FIRST = torch.tensor([1.0, 2.0, 0.0, -4.0, 1e-6, 0.0], dtype=torch.float64)
SECOND = torch.tensor([3.0, 0.0, 5.0, 4.0, 0.0, 0.0], dtype=torch.float64)


def test_ram_averages_what_both_changed_and_keeps_what_one_did():
    assert apply(RAM, [FIRST, SECOND], base=BASE).tolist() == [2, 2, 5, 0, 0, 0]


def test_a_change_of_epsilon_is_none():
    assert apply(RAM, [FIRST, SECOND], base=BASE, epsilon=2.0).tolist() == [3, 0, 5, 0, 0, 0]


def test_ramplus_reinforces_unique_changes_by_the_overlap():
    # Two shared, one unique: the ratio 2 counts as alpha.
    merged = apply(LOCAL, [FIRST, SECOND], base=BASE, r=0.5, alpha=1.0)
    assert merged.tolist() == [2, 3, 7.5, 0, 0, 0]
    assert apply(LOCAL, [FIRST, SECOND], base=BASE, r=0.5, alpha=10.0).tolist() == [
        2,
        4,
        10,
        0,
        0,
        0,
    ]


def test_more_than_255_models_are_counted():
    models = [torch.full((3,), 2.0, dtype=torch.float64)] * 300
    assert apply(RAM, models, base=torch.zeros(3).double()).tolist() == [2, 2, 2]


def test_ramplus_looks_at_all_tensors_and_its_local_form_at_each(tmp_path: Path):
    params = {"epsilon": 0.03, "r": 2.0, "alpha": 5.0}
    both = [
        Family(tmp_path / name, find_method(name), torch.float32).merged(params)
        for name in ("ramplus", "ramplus_tl")
    ]
    assert any(not torch.equal(both[0][name], both[1][name]) for name in both[0])


def test_magmax_takes_the_later_of_equal_magnitudes():
    assert apply(MAGMAX, [FIRST, SECOND], base=BASE, lambda_=1.0).tolist() == [3, 2, 5, 4, 1e-6, 0]
    assert apply(MAGMAX, [SECOND, FIRST], base=BASE, lambda_=1.0)[3] == -4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fusion_takes_weights_bit_for_bit_from_one_or_the_other(dtype):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(300, 257, generator=generator).to(dtype)
    other = base + 0.1 * torch.randn(300, 257, generator=generator).to(dtype)
    merged = apply(FUSION, [other], base=base)
    taken = (merged == other) & (other != base)
    assert 0.02 < taken.double().mean() < 0.3
    assert torch.equal(merged[~taken], base[~taken])


def test_fusion_does_not_depend_on_the_parts():
    generator = torch.Generator().manual_seed(0)
    base, change = (torch.randn(900, 257, generator=generator) for _ in range(2))
    merged = [apply(FUSION, [base + 0.1 * change], base=base, part=p) for p in (257, 5000, 1 << 20)]
    assert torch.equal(merged[0], merged[1])
    assert torch.equal(merged[0], merged[2])


def test_nearswap_never_moves_a_weight_by_more_than_t():
    base, other = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)).double()
    merged = apply(NEARSWAP, [other], base=base, t=0.2)
    assert float((merged - base).abs().max()) <= 0.2 + 1e-12
    near = (other - base).abs() <= 0.2
    assert torch.equal(merged[near], other[near])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["base", "other"])
def test_fusion_keeps_what_is_not_finite_for_the_engine_to_name(bad, where):
    base, other = torch.rand(4, 6), torch.rand(4, 6)
    (base if where == "base" else other)[1, 2] = bad
    with np.errstate(all="ignore"):
        assert not apply(FUSION, [other], base=base).isfinite().all()
