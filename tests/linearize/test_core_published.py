"""The cores against values that the authors' own code computed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from linearize.core_inputs import close
from surgery.models.linear_core import State, linear_attention, window_attention


@pytest.fixture(scope="module")
def oracle(test_data):
    file = test_data / "oracle" / "linearization.safetensors"
    if not file.is_file():
        pytest.skip("no values of linearization among the extra test data")
    notes = json.loads(file.with_suffix(".json").read_text())["cases"]
    return load_file(file), notes


def heads_first(x):
    """Shapes: [b, t, h, w] to [b, h, 1, t, w]."""
    return x.transpose(1, 2)[:, :, None]


@pytest.mark.parametrize(
    ("case", "end"), [("fla_gla", ""), ("fla_gla", "_h0"), ("fla_gla_strong_decay", "")]
)
def test_gated_attention_is_what_is_published(oracle, case, end):
    found, _ = oracle
    q, k, v = (heads_first(found[f"fla_gla.{name}"]) for name in "qkv")
    zeros = torch.zeros(len(q), dtype=torch.long)
    state = State(found["fla_gla.h0"][:, :, None], zeros) if end else None
    gate = heads_first(found[f"{case}.gk"])
    out, after = linear_attention(q * q.shape[-1] ** -0.5, k, v, gate, state=state)
    close(out, heads_first(found[f"{case}.o{end}"]), tolerance=2e-5)
    close(after.sums[:, :, 0], found[f"{case}.ht{end}"], tolerance=2e-5)


def test_taylor_features_are_what_is_published(oracle):
    found, notes = oracle
    assert "1+s+s^2/2" in notes["fla_based"]["note"]
    q, k, v = (heads_first(found[f"fla_gla.{name}"]) for name in "qkv")
    q = q * q.shape[-1] ** -0.5

    def features(x):
        square = (x[..., None] * x[..., None, :]).flatten(-2) / 2**0.5
        return torch.cat((torch.ones_like(x[..., :1]), x, square), -1)

    out, _ = linear_attention(features(q), features(k), torch.nn.functional.pad(v, (0, 1), value=1))
    close(out[..., :-1] / out[..., -1:], found["fla_based.o"][:, :, None])


def test_normalised_attention_is_what_is_published(oracle):
    found, _ = oracle
    q, k = (found[f"lolcats_hedgehog.f_{name}"][:, :, None] for name in "qk")
    v = torch.nn.functional.pad(found["lolcats_hedgehog.v"][:, :, None], (0, 1), value=1)
    out, _ = linear_attention(q, k, v)
    close(out[..., :-1] / out[..., -1:], found["lolcats_linear.y_quadratic"][:, :, None])


def test_window_and_shifted_keys_under_one_normaliser_are_what_is_published(oracle):
    found, _ = oracle
    q, k, v = (found[f"lolcats_hedgehog.{name}"][:, :, None] for name in "qkv")
    t = q.shape[3]
    width = int(found["lolcats_hybrid_sw.mask_window"][0, 0].sum(-1).max())
    near = window_attention(q, k, v, window=width, scale=q.shape[-1] ** -0.5)
    asked, given = (found[f"lolcats_hedgehog.f_{name}"][:, :, None] for name in "qk")
    told = torch.nn.functional.pad(v, (0, 1), value=1)
    given, told = (torch.nn.functional.pad(x, (0, 0, width, 0))[:, :, :, :t] for x in (given, told))
    far, _ = linear_attention(asked, given, told)
    factor = found["lolcats_hybrid_sw.gamma"][:, :, None]
    num = factor * near.num + far[..., :-1]
    close(num / (factor * near.den + far[..., -1:]), found["lolcats_hybrid_sw.y"][:, :, None])
