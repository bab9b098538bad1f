"""Mixers compute what the published code does."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from linearize.mixer_inputs import (
    HIDDEN,
    in_pieces,
)
from surgery.models.linear_mixers import MIXERS
from surgery.models.linear_near import Near
from surgery.models.linear_seen import Seen, Shape


@pytest.fixture(scope="module")
def published(test_data):
    """Numbers that public code computed."""
    return load_file(test_data / "oracle" / "linearization.safetensors")


@pytest.fixture(scope="module")
def theirs(published):
    """Their queries, keys and values: every head has its own."""
    q, k, v = (published[f"lolcats_hedgehog.{n}"][:, :, None] for n in "qkv")
    return Seen(torch.zeros(2, 37, HIDDEN), q, k, v, q, k, None)


def like_theirs(method, published, **spec):
    """A mixer with their maps."""
    shape = Shape(hidden=HIDDEN, heads=4, kv_heads=4, head_dim=16, scale=0.25)
    full = {"method": method, "feature_dim": 8, "feature_map": "softmax", **spec}
    made = MIXERS[method](full, shape)
    made.reset()
    with torch.no_grad():
        made.query_map.copy_(published["lolcats_hedgehog.Wq"])
        made.key_map.copy_(published["lolcats_hedgehog.Wk"])
    return made


CLOSE = {"atol": 2e-6, "rtol": 1e-5}


@torch.no_grad()
def test_features_are_those_of_the_published_code(published, theirs):
    made = like_theirs("hedgehog", published)
    found = made.query_features(theirs.q)[:, :, 0], made.key_features(theirs.k)[:, :, 0]
    torch.testing.assert_close(found[0], published["lolcats_hedgehog.f_q"], **CLOSE)
    torch.testing.assert_close(found[1], published["lolcats_hedgehog.f_k"], **CLOSE)
    made.reset()
    assert torch.equal(made.query_map, published["lolcats_identity_init.W"])
    own = made.query_features(theirs.q)[:, :, 0]
    torch.testing.assert_close(own, published["lolcats_identity_init.f_q"], **CLOSE)


@pytest.mark.parametrize("form", ["y_quadratic", "y_cumsum"])
@torch.no_grad()
def test_linear_attention_is_that_of_the_published_code(published, theirs, form):
    found = like_theirs("hedgehog", published)(theirs, None)
    y = published[f"lolcats_linear.{form}"].transpose(1, 2).flatten(2)
    torch.testing.assert_close(found, y, **CLOSE)


@pytest.mark.parametrize("pieces", [[37], [1] * 37, [20, 17]], ids=len)
@torch.no_grad()
def test_the_window_and_what_is_before_it_are_those_of_the_published_code(
    published, theirs, pieces
):
    mask = published["lolcats_hybrid_sw.mask_window"][0, 0]
    made = like_theirs("lolcats", published, window=int(mask.sum(-1).max()))
    gamma = published["lolcats_hybrid_sw.gamma"].flatten()
    made.window_factors.copy_(torch.special.logit(gamma))
    found = in_pieces(made, theirs, pieces)
    y = published["lolcats_hybrid_sw.y"].transpose(1, 2).flatten(2)
    torch.testing.assert_close(found, y, **CLOSE)


@torch.no_grad()
def test_based_is_that_of_the_published_code(published):
    q, k, v = (published[f"fla_gla.{n}"].transpose(1, 2)[:, :, None] for n in "qkv")
    made = MIXERS["based"](
        {"method": "based", "feature_dim": 16, "feature_map": "taylor", "window": 1},
        Shape(hidden=HIDDEN, heads=2, kv_heads=2, head_dim=16, scale=0.25),
    )
    made.reset()
    # Theirs has no window: the linear part of ours, over all keys.
    num, den = made.sums(q, Near(k, v, None, 0), None, None, None)
    torch.testing.assert_close((num / den)[:, :, 0], published["fla_based.o"], atol=1e-5, rtol=1e-4)
