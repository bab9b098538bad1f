"""Each method against a float64 reference written from its paper."""

from __future__ import annotations

import math

import pytest
import torch
from factor_models import FIXTURES, METHODS, record, tensors
from safetensors.torch import load_file

from growth.factor.form import Form
from growth.factor.numbers import dense, low_rank, monarch, sparse_low_rank, whitened_low_rank

N, M = 12, 18


@pytest.fixture
def matrix():
    return torch.randn(N, M, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def gram():
    source = torch.Generator().manual_seed(2)
    x = torch.randn(M, 100, generator=source, dtype=torch.float64)
    x *= torch.logspace(-1, 1, M, dtype=torch.float64)[:, None]
    return x @ x.T


def truncated(matrix, rank):
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def length(matrix, gram):
    return float(((matrix @ gram) * matrix).sum())


@pytest.mark.parametrize("svd", ["exact", "gram", "randomized"])
def test_svd_is_the_nearest_of_its_rank_with_even_factors(matrix, svd):
    a, b = low_rank(matrix, 4, svd=svd, seed="x")
    assert torch.allclose(b @ a, truncated(matrix, 4), atol=1e-10)
    assert torch.allclose(a.norm(dim=1), b.norm(dim=0))


def test_svd_llm_loses_the_truncated_singular_values_of_w_s(matrix, gram):
    """Corollary of section 3.2: the squared loss is the sum of the squares that are cut off."""
    a, b = whitened_low_rank(matrix, gram, 4, svd="exact", seed="x")
    s = torch.linalg.cholesky(gram)
    cut = torch.linalg.svdvals(matrix @ s)[4:].square().sum()
    assert length(matrix - b @ a, gram) == pytest.approx(float(cut), rel=1e-6)
    expected = truncated(matrix @ s, 4) @ torch.linalg.inv(s)
    assert torch.allclose(b @ a, expected, atol=1e-4)
    assert length(matrix - truncated(matrix, 4), gram) > float(cut)


def test_svd_llm_bears_inputs_that_are_always_zero(matrix, gram):
    gram[3], gram[:, 3] = 0.0, 0.0
    a, b = whitened_low_rank(matrix, gram, 4, svd="exact", seed="x")
    assert (b @ a).isfinite().all()
    assert length(matrix - b @ a, gram) < length(matrix - truncated(matrix, 4), gram)


def test_monarch_takes_the_nearest_outer_product_of_every_shuffled_block(matrix):
    form = Form(kind="monarch", outputs=N, inputs=M, rank=1, blocks=(3, 4))
    expected = torch.empty(N, M, dtype=torch.float64)
    for k in range(3):
        for j in range(4):
            rows, columns = slice(j, N, 4), slice(6 * k, 6 * k + 6)
            expected[rows, columns] = truncated(matrix[rows, columns], 1)
    a, b = monarch(matrix, form)
    assert a.shape == (3, 4, 6)
    assert b.shape == (4, 3, 3)
    assert torch.allclose(dense(form, (a, b)), expected, atol=1e-12)


def test_monarch_is_two_block_diagonals_and_a_shuffle(matrix):
    """The paper's P L P^T R with explicit permutations, on a square map with 3 by 3 blocks of 3."""
    square = matrix[:9, :9]
    form = Form(kind="monarch", outputs=9, inputs=9, rank=1, blocks=(3, 3))
    a, b = monarch(square, form)
    shuffle = torch.zeros(9, 9, dtype=torch.float64)
    for i in range(9):
        shuffle[i, i % 3 * 3 + i // 3] = 1.0  # [3, 3] transposed
    left, right = torch.block_diag(*b), torch.block_diag(*a)
    product = shuffle @ left @ shuffle.T @ right
    assert torch.allclose(dense(form, (a, b)), product, atol=1e-12)


def test_sparse_low_rank_is_a_fixed_point_and_beats_its_first_step(matrix):
    form = Form(kind="sparse-low-rank", outputs=N, inputs=M, rank=3, entries=20)
    parts = sparse_low_rank(matrix, form, dtype=torch.float64, svd="exact", seed="x")
    a, b, places, values = parts
    left = (matrix - b @ a).view(-1)
    assert torch.equal(left[places], values)
    assert set(left.abs().argsort()[-20:].tolist()) == set(places.tolist())
    first = (matrix - truncated(matrix, 3)).view(-1)
    once = first.clone()
    once[first.abs().argsort()[-20:]] = 0.0
    error = (matrix - dense(form, parts)).square().sum()
    assert float(error) < float(once.square().sum())


def test_a_planted_product_with_a_few_weights_is_found_again():
    source = torch.Generator().manual_seed(4)
    low = torch.randn(40, 2, generator=source, dtype=torch.float64)
    low = low @ torch.randn(2, 30, generator=source, dtype=torch.float64)
    planted = torch.randperm(1200, generator=source)[:15].sort().values
    whole = low.clone()
    whole.view(-1)[planted] += 30.0
    form = Form(kind="sparse-low-rank", outputs=40, inputs=30, rank=2, entries=15)
    found = sparse_low_rank(whole, form, dtype=torch.float64, svd="exact", seed="x")
    assert torch.equal(found[2], planted)
    assert float((whole - dense(form, found)).square().sum() / whole.square().sum()) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_told_errors_are_those_of_what_is_stored(factored, statistics, method):
    path = factored("base", method, ratio=0.5)
    told, found, base = record(path)["told"], tensors(path), tensors(FIXTURES / "base")
    grams = load_file(statistics.files[0])
    module = "model.layers.1.mlp.down_proj"
    form = Form(outputs=128, inputs=352, **_form(record(path)["facts"]["factored"][module]))
    parts = [found[f"{module}.{name}"] for name in form.specs("F32")]
    made = dense(form, [p.double() if p.is_floating_point() else p for p in parts])
    old, gram = base[f"{module}.weight"].double(), grams[f"{module}.gram"].double()
    figures = told[f"{module}.factor_A"]
    share = float((old - made).square().sum() / old.square().sum())
    assert figures["error"] == pytest.approx(share, rel=1e-4)
    share = length(old - made, gram) / length(old, gram)
    assert figures["output_error"] == pytest.approx(share, rel=1e-3)


def _form(told):
    return {**told, "blocks": tuple(told.get("blocks", (1, 1)))}


@pytest.mark.parametrize("method", METHODS)
def test_a_ratio_keeps_that_share_of_every_map(factored, method):
    path = factored("base", method, ratio=0.5)
    for told in record(path)["facts"]["factored"].values():
        assert told["rank"] >= 1
    rank = record(path)["facts"]["factored"]["model.layers.0.mlp.up_proj"]["rank"]
    size = 352 * 128
    expected = {
        "svd": math.floor(size * 0.5 / 480),
        "sparse-low-rank": math.floor((size * 0.5 - round(size * 0.03)) / 480),
        "monarch": math.floor(size * 0.5 / (8 * 352 + 16 * 128)),
    }
    assert rank == expected[method]


def test_energy_takes_the_least_rank_that_keeps_it(factored):
    path = factored("base", "svd", energy=0.9)
    base = tensors(FIXTURES / "base")
    for module, told in record(path)["facts"]["factored"].items():
        squares = torch.linalg.svdvals(base[f"{module}.weight"].double()).square()
        kept = squares.cumsum(0) / squares.sum()
        assert kept[told["rank"] - 1] >= 0.9 - 1e-9
        assert told["rank"] == 1 or kept[told["rank"] - 2] < 0.9


@pytest.mark.parametrize("method", ["svd-llm", "monarch"])
def test_energy_counts_outputs_with_svd_llm_and_blocks_with_monarch(factored, method):
    path = factored("base", method, energy=0.8)
    errors = [f for f in record(path)["told"].values() if "error" in f]
    of = "output_error" if method == "svd-llm" else "error"
    assert max(figures[of] for figures in errors) <= 0.2 + 2e-3


def test_whitening_lowers_the_error_of_every_maps_outputs(factored):
    plain, whitened = (record(factored("base", m, ratio=0.5)) for m in ("svd", "svd-llm"))
    assert whitened["facts"]["factored"] == plain["facts"]["factored"]
    for name, figures in plain["told"].items():
        if "output_error" in figures:
            assert whitened["told"][name]["output_error"] < figures["output_error"]


def test_whitening_saves_bits_per_byte_of_text_it_was_not_measured_on(factored, halves):
    from surgery.evaluate import evaluate

    plain, whitened = (factored("base", method, ratio=0.5) for method in ("svd", "svd-llm"))
    found = evaluate([plain, whitened], [halves[1]], parent=str(plain))
    assert found.models[1].domains[0].difference.high < 0
