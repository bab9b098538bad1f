"""A resized tensor holds what plain numpy makes of the same sums, whatever rows are read."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from growth.dimensions import Axis, Segment
from growth.resized import Mix, along, resized, selection
from surgery.checkpoint import open_checkpoint, read_rows
from surgery.checkpoint.view import row_shape, rows_of

SHAPES = ((6,), (6, 4), (3, 6, 4))
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F64": torch.float64}


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    """Stored tensors of one to three axes, with a reader of their rows and their values."""
    folder = tmp_path_factory.mktemp("tensors")
    made = {
        f"layers.0.{code}.{len(shape)}": torch.randn(shape, dtype=torch.float64).to(dtype)
        for code, dtype in DTYPES.items()
        for shape in SHAPES
    }
    save_file(made, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "num_hidden_layers": 1}))

    def read(tensor, start, count):
        rows = made[tensor.name].reshape(-1, *row_shape(tensor.shape))
        assert 0 <= start <= start + count <= len(rows)
        return rows[start : start + count]

    found = open_checkpoint(folder).tensors
    return lambda code, axes: (
        found[f"layers.0.{code}.{axes}"],
        read,
        made[f"layers.0.{code}.{axes}"],
    )


def dense(mix, size):
    """The mix as a matrix [new, old]."""
    made = np.zeros((mix.size, size))
    for i, (sources, factors) in enumerate(zip(mix.sources, mix.factors, strict=True)):
        for source, factor in zip(sources, factors, strict=True):
            made[i, source] += factor
    return made


def expected(values, mixes):
    """The same by tensor products in float64."""
    made = values.double().numpy()
    for axis, mix in enumerate(mixes):
        if mix is not None:
            moved = np.tensordot(dense(mix, made.shape[axis]), made, axes=(1, axis))
            made = np.moveaxis(moved, 0, axis)
    return made


@st.composite
def some_mix(draw, size):
    """None, a selection, or sums of up to three old indices."""
    kind = draw(st.sampled_from(["none", "selection", "sum"]))
    if kind == "none":
        return None
    new, terms = draw(st.integers(1, 9)), draw(st.integers(1, 3)) if kind == "sum" else 1
    index = st.lists(st.integers(0, size - 1), min_size=terms, max_size=terms)
    sources = np.array(draw(st.lists(index, min_size=new, max_size=new)))
    if kind == "selection":
        return selection(sources[:, 0])
    factor = st.lists(st.sampled_from([0.5, 1.0, -2.0, 0.0]), min_size=terms, max_size=terms)
    return Mix(sources, np.array(draw(st.lists(factor, min_size=new, max_size=new))))


@given(data=st.data(), shape=st.sampled_from(SHAPES), code=st.sampled_from([*DTYPES]))
@settings(max_examples=150, deadline=None)
def test_rows_of_a_resized_tensor_are_sums_of_old_indices(data, shape, code, tensors):
    tensor, read, values = tensors(code, len(shape))
    mixes = [data.draw(some_mix(size)) for size in shape]
    made = resized(tensor, mixes)
    wanted = expected(values, mixes)
    assert made.shape == wanted.shape
    rows = rows_of(made)
    start = data.draw(st.integers(0, rows - 1))
    count = data.draw(st.integers(1, rows - start))
    found = read_rows(read, made, start, count).double().numpy()
    flat = wanted.reshape(rows, *row_shape(wanted.shape))[start : start + count]
    np.testing.assert_allclose(found, flat, rtol=1e-6 if code == "BF16" else 1e-14, atol=1e-6)


def test_what_is_only_moved_keeps_its_bits(tensors):
    tensor, read, values = tensors("BF16", 2)
    made = resized(tensor, (selection([5, 0, 0]), selection([3, 3, 1])))
    found = read_rows(read, made, 0, 3)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, values[[5, 0, 0]][:, [3, 3, 1]])


def test_a_tensor_that_stays_is_returned_as_it_is(tensors):
    tensor, _, _ = tensors("F32", 2)
    assert resized(tensor, (None, None)) is tensor


def test_other_mixes_have_another_key(tensors):
    tensor, _, _ = tensors("F32", 2)
    keys = {
        resized(tensor, mixes).key
        for mixes in (
            (selection([0, 1]), None),
            (selection([1, 0]), None),
            (None, selection([0, 1])),
            (selection([0, 1]).scaled(np.array([0.5, 1.0])), None),
        )
    }
    assert len(keys) == 4


def test_views_nest(tensors):
    tensor, read, values = tensors("F64", 2)
    once = resized(tensor, (selection([4, 2]), None))
    twice = resized(once, (selection([1, 1, 0]), selection([2, 0]).scaled(np.array([0.5, 2.0]))))
    found = read_rows(read, twice, 1, 2)
    assert torch.equal(found, values[[2, 4]][:, [2, 0]] * torch.tensor([0.5, 2.0]).double())


def test_along_an_axis_each_segment_follows_its_own_dimension():
    axis = Axis((Segment("query", 2, 2), Segment("key", 1, 2), Segment("fixed", 1)))
    pair = Mix(np.array([[0, 1]]), np.array([[0.5, 0.25]]))
    mix = along(axis, {"query": pair, "key": selection([0, 0])})
    wanted = np.zeros((7, 7))
    wanted[[0, 1], [0, 1]], wanted[[0, 1], [2, 3]] = 0.5, 0.25
    wanted[[2, 3, 4, 5, 6], [4, 5, 4, 5, 6]] = 1.0
    assert (dense(mix, 7) == wanted).all()


def test_along_an_axis_of_other_dimensions_nothing_changes():
    assert along(Axis((Segment("vocab", 3),)), {"hidden": selection([0])}) is None
