"""What other commands make of a linearized checkpoint: it works, or is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from growth.expand import expand
from growth.linears import find_linears
from growth.prune import prune
from growth.sparsify import sparsify
from growth.stack import stack
from growth.widen import widen
from surgery.checkpoint import open_checkpoint
from surgery.errors import PlanError
from surgery.linearize.convert import linearize
from surgery.run import run

RESHAPED = {
    "expand": lambda base: expand(base, blocks=2),
    "prune": lambda base: prune(base, layers="1"),
    "stack": lambda base: stack(base, factor=2),
}


@pytest.fixture(scope="module")
def converted(structure, tmp_path_factory):
    """A linearized directory by method, its second layer with softmax attention; written once."""
    made = {}

    def get(method):
        if method not in made:
            plan = linearize(open_checkpoint(structure("llama")), method=method, keep_softmax="1")
            made[method] = run(plan, tmp_path_factory.mktemp("linearized") / "out").out
        return made[method]

    return get


@pytest.mark.parametrize("method", ["lolcats", "gla", "gated-delta"])
def test_parameters_of_mixers_are_no_linear_maps(converted, method):
    _, linears = find_linears(open_checkpoint(converted(method)))
    assert linears
    assert not [linear.module for linear in linears if ".mixer." in linear.module]


def test_zeros_are_set_beside_mixers_alone(converted, tmp_path):
    plan = sparsify(open_checkpoint(converted("gla")), method="magnitude", sparsity="0.5")
    before, after = (
        load_file(path / "model.safetensors")
        for path in (converted("gla"), run(plan, tmp_path / "out").out)
    )
    for name, values in before.items():
        touched = not torch.equal(after[name], values)
        assert touched == ("_proj" in name), name


@pytest.mark.parametrize("method", ["lolcats", "gla", "liger"])
def test_its_widths_are_refused_by_the_kind_of_model(converted, method):
    with pytest.raises(PlanError, match="linearized"):
        widen(open_checkpoint(converted(method)), factor=2)


@pytest.mark.parametrize("method", ["liger", "gated-delta"])
@pytest.mark.parametrize("change", RESHAPED)
def test_layers_come_and_go_with_their_mixers(converted, tmp_path, change, method):
    out = run(RESHAPED[change](open_checkpoint(converted(method))), tmp_path / "out").out
    model, told = AutoModelForCausalLM.from_pretrained(
        out, trust_remote_code=True, output_loading_info=True
    )
    assert not any(told.values())
    layers = range(len(model.model.layers))
    kept = [n for n in layers if not hasattr(model.model.layers[n].self_attn, "mixer")]
    assert kept == [n for n in layers if n not in model.config.linear_layers]
    with torch.no_grad():
        cached = model.generate(torch.arange(5)[None], max_new_tokens=4, do_sample=False)
    assert cached.shape[1] > 5
