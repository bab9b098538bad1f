"""What is special of PCB and WIDEN: ranks, thresholds, and what zero divided by zero is."""

import pytest
import torch

from merges.pcb import pcb
from merges.widen import widen
from reference import widen as naive
from surgery.apply import apply
from surgery.method import Place


def given(shape, *, models=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    deltas = [
        0.02 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(models)
    ]
    return base, deltas


def merged(method, base, deltas, **params):
    found = apply(method, [base + d for d in deltas], base=base, **{"lambda": 1.0, **params})
    return found - base


def test_pcb_of_one_vector_keeps_its_most_competitive_elements():
    base, (delta,) = given((100,), models=1)
    found = merged(pcb, base, [delta], ratio=0.2, clamp=0.0, scope="tensor")
    order = delta.abs().argsort(descending=True)
    # The twentieth scores 0: the least score that counts is where counting starts.
    assert torch.allclose(found[order[:19]], delta[order[:19]], rtol=0, atol=1e-12)
    assert float(found[order[19:]].abs().max()) == 0


def test_pcb_clamps_the_magnitudes_at_both_ends():
    base, (delta,) = given((100,), models=1)
    found = merged(pcb, base, [delta], ratio=1.0, clamp=0.1, scope="tensor")
    sizes = delta.abs().sort().values
    assert float(found.abs().max()) == pytest.approx(float(sizes[-10]), rel=1e-9)


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_pcb_of_equal_magnitudes_is_their_mean(scope):
    base = torch.zeros(50, dtype=torch.float64)
    deltas = [torch.full_like(base, value) for value in (0.5, 0.25)]
    found = merged(pcb, base, deltas, scope=scope)
    assert torch.allclose(found, torch.full_like(base, 0.375))


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_pcb_takes_no_part_of_a_model_that_changed_nothing(scope):
    base, (delta, _) = given((100,), models=2)
    found = merged(pcb, base, [delta, 0 * delta], clamp=0.0, ratio=0.3, scope=scope)
    kept = found != 0
    assert 0 < int(kept.sum()) <= 30
    assert torch.allclose(found[kept], delta[kept], rtol=0, atol=1e-12)


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_pcb_of_one_element_is_the_mean_of_what_agrees(scope):
    base = torch.tensor([1.0], dtype=torch.float64)
    found = merged(pcb, base, [base * 0 + 0.5, base * 0 + 0.1], scope=scope)
    assert float(found) == pytest.approx(0.3)


def test_widen_gives_untouched_columns_no_rank_by_noise():
    base, deltas = given((30, 20))
    for delta in deltas:
        delta[:, ::2] = 0
    found = merged(widen, base, deltas)
    assert float(found[:, ::2].abs().max()) == 0
    # The ten touched columns rank above the ten untouched, so all are above the mean.
    assert torch.allclose(found[:, 1::2], sum(deltas)[:, 1::2], rtol=0, atol=1e-12)


def test_widen_sees_a_column_of_zeros_that_stays_one_as_unchanged():
    base, deltas = given((30, 4), models=2)
    base[:, 1] = 0
    for delta in deltas:
        delta[:, 1] = 0
    deltas[0][0, 1] = 0.01  # from nothing to something: turned as far as can be
    found = merged(widen, base, deltas)
    assert bool(found.isfinite().all())
    assert float(found[0, 1]) > 0


@pytest.mark.parametrize("embeddings", ["rows", "columns"])
@pytest.mark.parametrize("part", [7, 64, 10_000])
def test_widen_looks_at_a_vocabulary_token_by_token(embeddings, part):
    base, deltas = given((40, 12))
    models = [base + d for d in deltas]
    params = {"embeddings": embeddings, "ratio": 1.2}
    found = apply(widen, models, base=base, part=part, vocabulary=True, **params)
    place = Place(name="tensor", vocabulary=True)
    wanted = naive.reference(base, models, place=place, **params)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("part", [5, 33, 64])
@pytest.mark.parametrize("shape", [(40, 12), (3, 10, 9), (5, 7), (2, 3, 4, 5), ()])
def test_widen_does_not_show_its_parts(part, shape):
    base, deltas = given(shape)
    models = [base + d for d in deltas]
    whole = apply(widen, models, base=base)
    assert torch.allclose(apply(widen, models, base=base, part=part), whole, rtol=0, atol=1e-12)
