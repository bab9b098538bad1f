"""Inputs without a direction, or with too many: what comes out is defined, and the reference's."""

from importlib import import_module

import pytest
import torch

from surgery.apply import apply
from surgery.method import find_method

NAMES = [
    *("arcee_fusion", "ema", "expo", "karcher", "lawa", "magmax", "model_stock", "multislerp"),
    *("nearswap", "nuslerp", "passthrough", "ram", "ramplus_tl", "slerp", "wsm"),
]
SHAPES = ((), (1,), (1, 1), (6, 1), (1, 6), (4, 6), (2, 3, 4))


def some(shape, seed):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ) + (0.1 if seed else 0)


def families(shape):
    """A base and three models each: what they have in common, by name."""
    base, a, b, c = (some(shape, seed) for seed in range(4))
    zero = torch.zeros(shape, dtype=torch.float64)
    return {
        "unrelated": (base, a, b, c),
        "all zero": (zero, zero, zero, zero),
        "zero base": (zero, a, b, c),
        "one zero": (zero, zero, b, c),
        "one equals the base": (base, base, b, c),
        "all equal the base": (base, base, base, base),
        "equal models": (base, a, a, a),
        "parallel changes": (base, base + a, base + 2 * a, base + 3 * a),
        "parallel models": (zero, a, 2 * a, 3 * a),
        "opposed models": (zero, a, -a, a),
        "opposed models of other lengths": (zero, a, -3 * a, 2 * a),
        "opposed changes": (base, base + a, base - a, base + a),
        "tiny changes": (base, base + 1e-12 * a, base + 1e-12 * b, base + 1e-12 * c),
    }


CASES = [
    pytest.param(name, params, family, id=f"{name}-{number}-{family}")
    for name in NAMES
    for number, params in enumerate(import_module(f"reference.{name}").CASES)
    for family in families(())
]


def check(name, base, models, params):
    method = find_method(name)
    models = models[: method.most or 3]
    given = base if method.base != "none" else None
    merged = apply(method, models, base=given, **params)
    expected = import_module(f"reference.{name}").reference(given, models, **params)
    assert torch.isfinite(merged).all(), merged.shape
    assert torch.allclose(merged, expected, rtol=1e-7, atol=1e-9), merged.shape


@pytest.mark.parametrize(("name", "params", "family"), CASES)
def test_degenerate_inputs_give_what_the_reference_gives(name, params, family):
    for shape in SHAPES:
        base, *models = families(shape)[family]
        check(name, base, models, params)


OPTIONAL = [case for case in CASES if case.values[0] in {"nuslerp", "multislerp"}]


@pytest.mark.parametrize(("name", "params", "family"), OPTIONAL)
def test_without_a_base_models_are_vectors_from_zero(name, params, family):
    _, *models = families((4, 6))[family]
    models = models[: find_method(name).most or 3]
    merged = apply(find_method(name), models, **params)
    expected = import_module(f"reference.{name}").reference(None, models, **params)
    assert torch.isfinite(merged).all()
    assert torch.allclose(merged, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("nuslerp", {"weight": [0.3, 0.9]}),
        ("nuslerp", {"weight": [0.3, 0.9], "nuslerp_flatten": False}),
        ("nuslerp", {"weight": [0.3, 0.9], "nuslerp_flatten": False, "nuslerp_row_wise": True}),
        ("multislerp", {"weight": [0.3, 0.9]}),
        ("karcher", {"weight": [0.3, 0.9]}),
    ],
)
def test_a_model_merged_with_itself_stays_itself_without_a_base(name, params, dtype):
    model = torch.randn(300, 257, generator=torch.Generator().manual_seed(0)).to(dtype)
    held = model.double() if dtype == torch.float32 else model
    merged = apply(find_method(name), [held, held], **params)
    assert torch.equal(merged.to(dtype), model)
