"""Averages over the checkpoints of a run, from the oldest to the newest."""

import pytest
import torch

from surgery.apply import apply
from surgery.errors import RecipeError
from surgery.method import find_method

LAWA, EMA, WSM = (find_method(name) for name in ("lawa", "ema", "wsm"))


def shares(method, count, **params):
    """What each of `count` checkpoints contributes."""
    models = list(torch.eye(count, dtype=torch.float64))
    return apply(method, models, **params).tolist()


@pytest.mark.parametrize(
    ("method", "params", "wanted"),
    [
        (LAWA, {}, [0.25, 0.25, 0.25, 0.25]),
        (LAWA, {"last": 2}, [0, 0, 0.5, 0.5]),
        (LAWA, {"last": 9}, [0.25, 0.25, 0.25, 0.25]),
        (EMA, {"decay": 0.5}, [0.125, 0.125, 0.25, 0.5]),
        (EMA, {"decay": 0.0}, [0, 0, 0, 1]),
        (WSM, {"curve": "linear"}, [0.25, 0.25, 0.25, 0.25]),
        (WSM, {"curve": "linear", "last": 2}, [0, 0, 0.5, 0.5]),
        (WSM, {"curve": "1-sqrt"}, [0.5, 0.5**0.5 - 0.5, 0.75**0.5 - 0.5**0.5, 1 - 0.75**0.5]),
        (WSM, {"curve": "cosine"}, [0.1464466, 0.3535534, 0.3535534, 0.1464466]),
    ],
)
def test_each_checkpoint_has_its_share(method, params, wanted):
    assert shares(method, 4, **params) == pytest.approx(wanted)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("method", "params"),
    [(LAWA, {}), (EMA, {}), *((WSM, {"curve": c}) for c in ("cosine", "1-sqrt"))],
)
def test_shares_sum_to_one(method, params, count):
    found = shares(method, count, **params)
    assert sum(found) == pytest.approx(1)
    assert min(found) > 0


def test_no_checkpoints_at_all_are_refused():
    with pytest.raises(RecipeError, match="is not at least 1"):
        shares(LAWA, 3, last=0)
