"""Stages of the task-vector methods at their edges; the laws compare whole methods."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merges.stages.combine import DRAW, elected
from merges.stages.outliers import first_of_rows
from merges.stages.parameters import groups
from merges.stages.ranked import UNIT, kept, probabilities
from surgery.apply import apply
from surgery.errors import RecipeError
from surgery.method import Place, find_method
from surgery.passes import Slices
from surgery.plan import Part

TRIMMING: list[tuple[str, dict[str, Any]]] = [
    ("task_arithmetic", {"weight": 1.0}),
    ("ties", {"weight": 1.0, "density": 0.5}),
    ("ties", {"weight": 1.0, "density": 0.5, "rescale": "l1", "elect": "raw"}),
    ("ties", {"weight": 1.0, "density": 0.5, "scope": "model", "lines_beta": 1.0}),
    ("dare_linear", {"weight": 1.0, "density": 0.5}),
    ("dare_ties", {"weight": 1.0, "density": 0.5}),
    ("della", {"weight": 1.0, "density": 0.5}),
    ("della_linear", {"weight": 1.0, "density": 0.5, "rescale": "inverse"}),
    ("breadcrumbs", {"weight": 1.0, "density": 0.5, "gamma": 0.1}),
    ("breadcrumbs_ties", {"weight": 1.0, "density": 0.5, "gamma": 0.1, "scope": "row"}),
    ("sce", {"select_topk": 0.3}),
]
IDS = [f"{name}-{number}" for number, (name, _) in enumerate(TRIMMING)]


def drawn(*shape: int, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "params"), TRIMMING, ids=IDS)
@pytest.mark.parametrize("shape", [(1,), (5, 1), (1, 5), (7,), (), (2, 3, 4)])
def test_small_shapes_are_merged(name: str, params: dict[str, Any], shape: tuple[int, ...]) -> None:
    base = drawn(*shape)
    models = [base + drawn(*shape, seed=n) for n in (1, 2)]
    merged = apply(find_method(name), models, base=base, **params)
    assert merged.shape == base.shape
    assert bool(merged.isfinite().all())


@pytest.mark.parametrize(("name", "params"), TRIMMING, ids=IDS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_even_where_it_is_dropped(
    name: str, params: dict[str, Any], wrong: float
) -> None:
    base = drawn(40, 50)
    models = [base + drawn(40, 50, seed=n) for n in (1, 2)]
    models[0].view(-1)[::7] = wrong
    merged = apply(find_method(name), models, base=base, part=500, **params)
    assert not bool(merged.view(-1)[::7].isfinite().any())


@pytest.mark.parametrize(("name", "params"), TRIMMING, ids=IDS)
def test_a_negative_zero_stays_one(name: str, params: dict[str, Any]) -> None:
    base = torch.full((6, 4), -0.0)
    merged = apply(find_method(name), [base.clone(), base.clone()], base=base, **params)
    assert bool(torch.signbit(merged).all())


@pytest.mark.parametrize(
    ("name", "params", "told"),
    [
        ("della", {"density": 0.9}, "0.15 does not fit density 0.9"),
        ("della", {"density": 0.1, "epsilon": 0.1}, "must lie in (0, 1)"),
        ("della_linear", {"density": [0.5, 0.95]}, "does not fit density 0.95"),
        ("della_linear", {"weight": [1.0, -1.0], "normalize": True}, "sum to zero"),
        ("task_arithmetic", {"weight": [1.0, -1.0], "normalize": True}, "sum to zero"),
        ("dare_linear", {"weight": [1.0, -1.0], "normalize": True}, "sum to zero"),
        ("ties", {"density": 7}, "density 7.0 is outside [0, 1]"),
        ("ties", {"density": -1}, "outside [0, 1]"),
        ("ties", {"scope": "row"}, "is none of tensor, model"),
        ("breadcrumbs", {"gamma": 1.5}, "outside [0, 1]"),
        ("dare_ties", {"rescale": "l2"}, "is none of none, l1, inverse"),
    ],
)
def test_what_cannot_be_is_refused_before_any_tensor(
    name: str, params: dict[str, Any], told: str
) -> None:
    base = drawn(3)
    with pytest.raises(RecipeError) as caught:
        apply(find_method(name), [base, base], base=base, **{"weight": 1.0, **params})
    assert told in str(caught.value)


def test_density_one_of_della_keeps_all_whatever_epsilon() -> None:
    base, model = drawn(4, 9), drawn(4, 9, seed=1)
    merged = apply(find_method("della"), [model], base=base, weight=1.0, density=1.0)
    assert torch.allclose(merged, model)


def test_rescale_takes_the_peers_switch() -> None:
    method = find_method("ties")
    base, model = drawn(50), drawn(50, seed=1)
    for switch, word in ((True, "l1"), (False, "none")):
        one, other = (
            apply(method, [model], base=base, weight=1.0, density=0.4, rescale=rescale)
            for rescale in (switch, word)
        )
        assert torch.equal(one, other)


def test_a_draw_elects_plus_and_a_clear_vote_its_sign() -> None:
    votes = [np.array([1.0, 2.0, -1.0, 0.0, 1.0]), np.array([-1.0, -1.0, 0.5, 0.0, -1.001])]
    assert (elected(votes)[0] == 0).tolist() == [True, True, False, True, False]


@given(st.lists(st.integers(-64, 64), min_size=2, max_size=6), st.permutations(range(6)))
@settings(deadline=None)
def test_the_order_of_votes_decides_no_draw(votes: list[int], order: list[int]) -> None:
    terms = [np.array([vote * 0.1], np.float32) for vote in votes]
    moved = [terms[n] for n in order if n < len(terms)]
    assert elected(terms)[0].item() == elected(moved)[0].item()
    exact = sum(votes)
    assert (elected(terms)[0].item() == 0) == (exact >= 0)
    assert abs(exact) > DRAW * sum(map(abs, votes)) or exact == 0


@pytest.mark.parametrize("count", [0, 1, 3, 7, 10])
def test_rows_are_cut_each_for_itself_and_ties_by_index(count: int) -> None:
    values = np.random.default_rng(1).integers(0, 3, (30, 10)).astype("float32")
    found = first_of_rows(values, count)
    for row, mask in zip(values, found, strict=True):
        expected = np.zeros(10, bool)
        expected[np.lexsort((np.arange(10), -row))[:count]] = True
        assert np.array_equal(mask, expected)


def bits(count: int) -> Any:
    return np.random.default_rng(4).integers(0, 2**32, count, dtype=np.uint32)


@pytest.mark.parametrize("levels", [1, 2, 7, 10**6])
def test_ranks_decide_how_often_a_magnitude_is_kept(levels: int) -> None:
    row = np.sort(np.random.default_rng(2).integers(0, levels, 40)).astype("float32")
    values = np.tile(row, (20000, 1))
    rate = kept(values, bits(values.size), 0.5, 0.3).mean(axis=0)
    assert np.abs(rate - probabilities(row[None], 0.5, 0.3)[0]).max() < 0.02
    assert abs(rate.mean() - 0.5) < 0.005


def test_probabilities_run_from_below_to_above_the_density() -> None:
    found = probabilities(np.array([[3.0, 1.0, 2.0, 4.0, 0.0]]), 0.5, 0.2)
    assert np.allclose(found, [[0.6, 0.4, 0.5, 0.7, 0.3]])
    assert np.allclose(probabilities(np.array([[1.0, 1.0, 1.0]]), 0.5, 0.2), 0.5)


@pytest.mark.parametrize(("columns", "epsilon"), [(1, 0.2), (8, 0.0)])
def test_without_ranks_the_density_decides(columns: int, epsilon: float) -> None:
    drawn_bits = bits(4000 * columns)
    values = np.ones((4000, columns), "float32")
    mask = kept(values, drawn_bits, 0.5, epsilon)
    assert np.array_equal(mask.reshape(-1), (drawn_bits >> 1) < UNIT // 2)


def test_dropped_at_random_keeps_the_sum_of_magnitudes() -> None:
    base = torch.zeros(300, 400)
    model = drawn(300, 400)
    for name in ("dare_linear", "della_linear"):
        merged = apply(find_method(name), [model], base=base, weight=1.0, density=0.4)
        assert 0.39 < float((merged != 0).float().mean()) < 0.41
        assert float(merged.abs().sum()) == pytest.approx(float(model.abs().sum()), rel=1e-5)


def test_divided_by_the_density_it_keeps_the_expected_value() -> None:
    base = torch.zeros(2000, 100)
    model = drawn(2000, 100)
    for name in ("dare_linear", "della_linear"):
        merged = apply(
            find_method(name), [model], base=base, weight=1.0, density=0.4, rescale="inverse"
        )
        assert abs(float(((merged - model) * model).mean())) < 0.02


@pytest.mark.parametrize("name", ["dare_linear", "della"])
def test_masks_drawn_again_are_the_masks_that_were_kept(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, model = drawn(90, 110), drawn(90, 110, seed=1)
    method = find_method(name)
    held = apply(method, [model], base=base, weight=1.0, density=0.4, part=770)
    monkeypatch.setattr("merges.stages.rescale.HELD", 0)
    again = apply(method, [model], base=base, weight=1.0, density=0.4, part=770)
    assert torch.equal(held, again)


def test_lines_scales_by_depth_and_leaves_what_is_in_no_layer_at_alpha() -> None:
    base, model = torch.zeros(5), torch.ones(5)
    method = find_method("task_arithmetic")
    for depth, expected in ((0.0, 0.25), (0.5, 0.625), (1.0, 1.0), (None, 0.25)):
        merged = apply(method, [model], base=base, weight=1.0, lines_alpha=0.25, depth=depth)
        assert merged.tolist() == [expected] * 5


def test_only_what_looks_at_the_whole_model_waits_for_it() -> None:
    assert groups({}) == ()
    assert groups({"lines_alpha": 0.2, "lines_beta": None}) == ()
    assert groups({"lines_alpha": None, "lines_beta": 1.0, "scope": "model"}) == ("trim", "lines")


def test_sce_orders_by_variance_exactly_for_two_and_for_more() -> None:
    from merges.sce import variation

    models = [drawn(200, seed=n).bfloat16().float() for n in range(4)]
    for count in (2, 3, 4):
        part = Slices(Part(0, 0, 200), torch.zeros(200), models[:count], Place(name="t"))
        expected = torch.stack(models[:count]).double().var(dim=0)
        assert np.array_equal(np.argsort(variation(part)), np.argsort(expected.numpy()))
        same = Slices(Part(0, 0, 200), torch.zeros(200), [models[0]] * count, Place(name="t"))
        assert not variation(same).any()
