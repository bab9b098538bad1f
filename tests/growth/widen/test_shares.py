"""Shares of a weight add up to it bit for bit, and noise sets the copies apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layer_oracle import prompt, stored

from growth.widen import widen
from growth.widen.maps import key_of
from growth.widen.shares import MOST_NOISE, PRECISION, draw, shares
from structures import load

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@given(
    code=st.sampled_from([*DTYPES]),
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=64),
    count=st.integers(2, 7),
    noise=st.floats(0, MOST_NOISE),
)
def test_shares_are_numbers_of_the_dtype_and_sum_to_the_whole(code, bits, count, noise):
    raw = np.array(bits, dtype=np.uint32)
    dtype = DTYPES[code]
    kind = np.uint32 if code == "F32" else np.uint16
    signed = np.int32 if code == "F32" else np.int16
    values = torch.from_numpy(raw.astype(kind).view(signed).copy()).view(dtype)
    whole = values[values.isfinite() & (values.abs() < torch.finfo(dtype).max / 8)].double().numpy()
    errors = draw((len(whole),), np.arange(len(whole)), count, noise=noise, key=3)
    parts = shares(whole, count, dtype=code, errors=errors)
    kept = torch.from_numpy(parts).to(dtype).double().numpy()
    assert (kept == parts).all()
    assert (parts.sum(axis=0) == whole).all()
    assert (np.abs(parts) <= np.abs(whole) + np.spacing(np.abs(whole))).all()


@pytest.mark.parametrize("count", [2, 3, 5])
def test_noise_has_the_deviation_that_is_asked_for(count):
    drawn = draw((200, 100), np.arange(200), count, noise=0.3, key=key_of("a"))
    assert np.abs(drawn.sum(axis=0)).max() < 1e-12
    assert drawn.std() == pytest.approx(0.3, rel=0.01)


def test_noise_of_a_row_does_not_depend_on_the_rows_read_with_it():
    whole = draw((9, 4), np.arange(9), 2, noise=0.3, key=1)
    part = draw((3, 4), np.arange(5, 8), 2, noise=0.3, key=1)
    assert (whole[:, 5:8] == part).all()


def test_the_columns_of_a_trained_bfloat16_model_sum_to_its_own(fixtures_dir, write):
    from surgery.checkpoint import open_checkpoint

    old = stored(fixtures_dir / "base")
    new = stored(write(widen(open_checkpoint(fixtures_dir / "base"), factor=3, noise=0.3)))
    name = "model.layers.1.mlp.down_proj.weight"
    rows, columns = old[name].shape
    parts = new[name].double().reshape(3, rows, 3, columns)
    assert torch.equal(parts.sum(dim=2), old[name].double().expand(3, rows, columns))
    assert not torch.equal(parts[0], parts[1])


def gradients(model):
    """Gradients of a loss by the name of the weight."""
    model.zero_grad()
    out = model(**prompt(), labels=prompt()["input_ids"])
    out.loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize(("noise", "alike"), [(0.0, True), (0.3, False)])
def test_without_noise_copies_stay_alike_in_training_and_with_it_they_part(
    noise, alike, opened, write
):
    model, _ = load("llama", write(widen(opened("llama"), factor=2, noise=noise)))
    found = gradients(model)
    for name in ("mlp.gate_proj", "self_attn.q_proj", "mlp.down_proj"):
        grad = found[f"model.layers.1.{name}.weight"]
        first, second = grad.chunk(2)
        close = (first - second).norm() < 1e-4 * grad.norm()
        assert close == alike, name


def test_other_seeds_give_other_noise(opened, write):
    name = "model.layers.0.mlp.up_proj.weight"
    one, two, again = (
        stored(write(widen(opened("llama"), factor=2, noise=0.3, seed=seed)))[name]
        for seed in (0, 1, 0)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, two)


def test_every_dtype_that_is_widened_has_a_precision():
    bits = {code: round(-np.log2(torch.finfo(dtype).eps)) + 1 for code, dtype in DTYPES.items()}
    assert bits == {code: PRECISION[code][0] for code in DTYPES}
