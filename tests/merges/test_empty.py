"""Tensors without elements, which any method must leave empty."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from laws.bench import count
from surgery.apply import apply, resolve
from surgery.checkpoint import open_checkpoint
from surgery.method import Place, find_method, method_names
from surgery.passes import merge_step
from surgery.plan import Plan, TensorSpec
from surgery.run import run


def given(method):
    return {name: 0.5 for name, p in method.parameters.items() if p.required and p.kind is float}


@pytest.mark.parametrize("name", method_names())
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_an_empty_tensor_stays_empty(tmp_path, name, shape):
    method = find_method(name)
    save_file({"w": torch.empty(shape)}, tmp_path / "in.safetensors")
    source = open_checkpoint(tmp_path / "in.safetensors")
    step = merge_step(
        method,
        name="w",
        spec=TensorSpec("F32", shape),
        base=source.tensors["w"] if method.base != "none" else None,
        models=[source.tensors["w"]] * count(method),
        values=resolve(method, given(method), count(method)),
        place=Place(name="w"),
    )
    plan = Plan(
        operation="merge",
        parameters={},
        sources=(source,),
        steps=(step,),
        order=("w",),
        config=None,
    )
    run(plan, tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["w"].shape == shape


@pytest.mark.parametrize("name", method_names())
def test_an_empty_tensor_stays_empty_in_memory(name):
    method = find_method(name)
    base = torch.empty(0, 3) if method.base != "none" else None
    merged = apply(method, [torch.empty(0, 3)] * count(method), base=base, **given(method))
    assert merged.shape == (0, 3)
