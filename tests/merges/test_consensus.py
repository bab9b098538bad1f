"""Consensus at its edges: by hand, at the ends of its parameters, and with NaN."""

import pytest
import torch

from merges.consensus import consensus
from surgery.apply import apply
from surgery.errors import RecipeError

BASE = torch.tensor([1.0, 1.0, 1.0, 1.0, -0.0])
# Task vectors: shared, of the first alone, opposed, small beside the other, none.
FIRST = BASE + torch.tensor([0.5, 0.5, 0.5, 0.125, 0.0])
SECOND = BASE + torch.tensor([0.5, 0.0, -0.5, 2.0, 0.0])


def merged(**params):
    return apply(consensus, [FIRST, SECOND], base=BASE, **params)


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        ({"k": 2, "scale": 1.0}, [2.0, 1.0, 1.0, 1.0, 0.0]),
        ({"k": 1, "scale": 1.0}, [2.0, 1.5, 1.0, 3.125, 0.0]),
        ({"k": 0, "scale": 1.0}, [2.0, 1.5, 1.0, 3.125, 0.0]),
        ({"k": 2, "scale": 1.0, "lambda_": 0.0625}, [2.0, 1.0, 1.0, 1.0, 0.0]),
        ({"k": 2, "scale": 1.0, "lambda_": 0.03125}, [2.0, 1.0, 1.0, 3.125, 0.0]),
        ({"k": 2, "scale": 1.0, "lambda_": [0.03125, 17.0]}, [1.0, 1.0, 1.0, 1.0, 0.0]),
        ({}, [1.0 + 0.3, 1.0, 1.0, 1.0, 0.0]),
    ],
)
def test_by_hand(params, wanted):
    """The mask is strict: at lambda 1/16 the fourth change of the first, 2/16 of 2, is not in."""
    assert torch.allclose(merged(**params), torch.tensor(wanted), atol=1e-7)


def test_where_nothing_is_added_the_base_keeps_its_bits():
    found = merged()
    assert torch.equal(torch.signbit(found), torch.signbit(BASE))


def test_more_tasks_than_models_cannot_agree():
    with pytest.raises(RecipeError, match="k 3 asks for more tasks than the 2 models"):
        merged(k=3)


@pytest.mark.parametrize(
    ("params", "told"),
    [({"lambda_": -0.1}, "lambda -0.1 is not at least 0"), ({"k": -1}, "k -1 is not")],
)
def test_parameters_have_ranges(params, told):
    with pytest.raises(RecipeError, match=told):
        merged(**params)


def test_nan_is_kept_for_the_engine_to_name():
    found = apply(consensus, [FIRST * float("nan"), SECOND], base=BASE)
    assert bool(found.isnan().all())
