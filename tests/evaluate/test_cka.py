"""Debiased CKA against its definition, and what must not change it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from surgery.evaluate import cka, evaluate
from surgery.evaluate.cka import centred, products

Make = Callable[..., Path]


def naive_hsic(x: torch.Tensor, y: torch.Tensor) -> float:
    """Song et al. 2012, equation 5, written out."""
    k, m = (z.double() @ z.double().T for z in (x, y))
    k, m = (g - torch.diag(g.diag()) for g in (k, m))
    n, one = len(k), torch.ones(len(k), dtype=torch.float64)
    trace = (k @ m).trace()
    sums = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    mixed = 2 / (n - 2) * (one @ k @ m @ one)
    return float((trace + sums - mixed) / (n * (n - 3)))


def sample(seed: int, rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def figure(x: torch.Tensor, y: torch.Tensor) -> float:
    cross, mine, theirs = products([centred(x)], [centred(y)])
    return float(cross / (mine * theirs).sqrt())


def test_hsic_equals_its_definition() -> None:
    x, y = sample(0, 12, 5) + 3, sample(0, 12, 7)[:, :7] - 1
    cross, mine, theirs = products([centred(x)], [centred(y)])
    assert float(cross) == pytest.approx(naive_hsic(x, y), rel=1e-9)
    assert float(mine) == pytest.approx(naive_hsic(x, x), rel=1e-9)
    assert float(theirs) == pytest.approx(naive_hsic(y, y), rel=1e-9)


def test_rotation_scale_and_shift_do_not_matter() -> None:
    x = sample(1, 40, 6)
    turn = torch.linalg.qr(sample(2, 6, 6))[0]
    assert figure(x, 3 * x @ turn + 100) == pytest.approx(1, abs=1e-4)


def test_unrelated_wide_features_are_near_zero_where_the_biased_figure_is_not() -> None:
    x, y = sample(3, 60, 500), sample(4, 60, 500)
    k, m = ((z - z.mean(0)) @ (z - z.mean(0)).T for z in (x, y))
    biased = float((k * m).sum() / (k.norm() * m.norm()))
    assert biased > 0.8
    assert abs(figure(x, y)) < 0.1


@pytest.fixture(scope="module")
def models(make_model: Make) -> list[Path]:
    return [make_model(seed=0), make_model(seed=1), make_model(seed=2, num_hidden_layers=3)]


def test_a_model_beside_itself_is_one_everywhere_on_the_diagonal(
    models: list[Path], documents: Path
) -> None:
    child = evaluate([models[0], models[0]], [documents], maps=True).models[1]
    found = child.against[0].similarity
    assert found.diagonal == pytest.approx([1, 1, 1], abs=1e-9)
    assert child.against[0].weights["identical"]


def test_depths_may_differ(models: list[Path], documents: Path) -> None:
    child = evaluate([models[0], models[2]], [documents], maps=True).models[1]
    found = child.against[0].similarity
    assert (len(found.matrix), len(found.matrix[0])) == (4, 3)
    assert child.against[0].weights["only_in_b"]


def test_the_map_equals_the_definition_over_the_hidden_states_of_transformers(
    models: list[Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = tmp_path / "short.txt"
    text.write_text("the cat sat on a mat")
    child = evaluate(models[:2], [text], maps=True).models[1]
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    ids = [tokenizer.bos_token_id, *tokenizer(text.read_text())["input_ids"]][:-1]
    mine, theirs = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(
            torch.tensor([ids]), output_hidden_states=True
        )
        for path in (models[1], models[0])
    )
    # Place 2 of transformers' is behind the last norm, so only the places before are compared.
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        x, y = mine.hidden_states[i][0].detach(), theirs.hidden_states[j][0].detach()
        scale = (naive_hsic(x, x) * naive_hsic(y, y)) ** 0.5
        expected = naive_hsic(x, y) / scale
        assert child.against[0].similarity.matrix[i][j] == pytest.approx(expected, abs=1e-5)


def test_batches_add_up(
    models: list[Path], documents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(models[:2], [documents], maps=True).models[1].against[0].similarity
    monkeypatch.setattr(cka, "BATCH", 128)
    cut = evaluate(models[:2], [documents], maps=True).models[1].against[0].similarity
    for mine, theirs in zip(whole.diagonal, cut.diagonal, strict=True):
        assert mine == pytest.approx(theirs, abs=0.1)


def test_other_tokenizers_have_a_weight_map_but_no_layer_map(
    make_model: Make, documents: Path
) -> None:
    other = make_model(seed=1, tokenizer={"merges": 4})
    found = evaluate([make_model(seed=0), other], [documents], maps=True).models[1].against[0]
    assert found.similarity is None
    assert found.weights is not None
    assert found.weights["mismatched"]
