"""Great circles and means on spheres: what formulas alone do not show."""

import pytest
import torch

from surgery.apply import apply
from surgery.errors import RecipeError
from surgery.method import find_method
from surgery.passes import dots

NUSLERP, MULTISLERP, KARCHER = (find_method(n) for n in ("nuslerp", "multislerp", "karcher"))


def some(count, shape=(40, 30), *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize(
    ("options", "axis"),
    [
        ({}, None),
        ({"nuslerp_flatten": False}, 1),
        ({"nuslerp_flatten": False, "nuslerp_row_wise": True}, 0),
    ],
)
def test_nuslerp_keeps_the_length_of_vectors_of_one_length(options, axis):
    a, b = (v / v.norm(dim=axis, keepdim=True) for v in some(2))
    merged = apply(NUSLERP, [a, b], weight=[0.7, 0.2], **options)
    lengths = merged.norm(dim=axis)
    assert torch.allclose(lengths, torch.ones_like(lengths))


def test_nuslerp_of_columns_adds_up_over_parts():
    models = some(2, (50, 7))
    options = {"weight": [0.7, 0.2], "nuslerp_flatten": False, "nuslerp_row_wise": True}
    whole = apply(NUSLERP, models, **options)
    assert torch.allclose(apply(NUSLERP, models, part=14, **options), whole, rtol=1e-12)


def test_nuslerp_row_wise_says_nothing_of_a_flattened_tensor():
    models = some(2)
    plain = apply(NUSLERP, models, weight=[0.7, 0.2])
    assert torch.equal(apply(NUSLERP, models, weight=[0.7, 0.2], nuslerp_row_wise=True), plain)


@pytest.mark.parametrize("name", ["nuslerp", "multislerp"])
def test_a_base_far_from_zero_does_not_count(name):
    base, *changes = some(3)
    weight = [0.7, 0.2]
    alone = apply(find_method(name), changes, weight=weight)
    models = [1e3 * base + change for change in changes]
    merged = apply(find_method(name), models, base=1e3 * base, weight=weight)
    assert torch.allclose(merged - 1e3 * base, alone, atol=1e-9)


def test_multislerp_takes_the_weighted_sum_where_directions_cancel():
    a, b = some(2)
    models = [a, b, -(a / a.norm() + b / b.norm())]
    weight = [1.0, 1.0, float((a / a.norm() + b / b.norm()).norm())]
    merged = apply(MULTISLERP, models, weight=weight)
    expected = sum(w * m for w, m in zip(weight, models, strict=True)) / sum(weight)
    assert torch.allclose(merged, expected)


@pytest.mark.parametrize(("name", "weight"), [("multislerp", [1.0, -1.0]), ("karcher", [0.0, 0.0])])
def test_weights_that_sum_to_zero_are_refused(name, weight):
    with pytest.raises(RecipeError, match="sum to zero"):
        apply(find_method(name), some(2), weight=weight)


def test_a_negative_karcher_weight_is_refused():
    with pytest.raises(RecipeError, match="is not at least 0"):
        apply(KARCHER, some(2), weight=[1.0, -0.5])


def test_karcher_of_two_is_the_point_between_them():
    a, b = (v / v.norm() for v in some(2))
    for weight in ([1.0, 1.0], [0.2, 0.8]):
        share = weight[1] / sum(weight)
        merged = apply(KARCHER, [a, b], weight=weight, max_iter=100, tol=1e-12)
        between = apply(NUSLERP, [a, b], weight=[1 - share, share])
        assert torch.allclose(merged, between, atol=1e-9)


def test_karcher_has_no_pull_left_at_its_mean():
    units = [v / v.norm() for v in some(4)]
    mean = apply(KARCHER, units, max_iter=100, tol=1e-12)
    pull = torch.zeros_like(mean)
    for unit in units:
        straight = unit - (unit * mean).sum() * mean
        pull += torch.arccos((unit * mean).sum()) * straight / straight.norm()
    assert float(pull.norm()) < 1e-9


def test_karcher_of_many_models_that_hardly_differ_is_their_average():
    base, *noise = some(6)
    models = [base + 1e-4 * n for n in noise]
    assert torch.allclose(apply(KARCHER, models), sum(models) / 5, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("size", [1, 4095, 4096, 10_001])
def test_dot_products_are_near_their_float64_at_any_scale(scale, size):
    vectors = [(v * scale).float() for v in some(3, (size,))]
    wide = [v.double() for v in vectors]
    pairs = [(i, j) for i in range(3) for j in range(i, 3)]
    expected = torch.tensor([float(wide[i] @ wide[j]) for i, j in pairs], dtype=torch.float64)
    lengths = torch.stack([wide[i].norm() * wide[j].norm() for i, j in pairs])
    found = torch.tensor(dots(vectors), dtype=torch.float64)
    assert float(((found - expected).abs() / lengths).max()) < 1e-6
    assert dots([v.numpy() for v in vectors]) == dots(vectors)
