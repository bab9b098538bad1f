"""A mixture tied into a loop (WideNet): one block of experts, a norm for each depth."""

from __future__ import annotations

import pytest
import torch

from growth.recurse.tying import relax, tie
from growth.recurse.unroll import untie
from growth.upcycle import upcycle
from structures import example_inputs
from surgery.checkpoint import open_checkpoint
from surgery.errors import PlanError

FAMILIES = ("llama", "qwen2")  # by way of Mixtral and Qwen2-MoE
EXPERTS = 4


@pytest.fixture
def mixture(structure, write):
    """A mixture whose experts differ, by the name of the dense model."""

    def make(name):
        base = open_checkpoint(structure(name))
        return open_checkpoint(write(upcycle(base, experts=EXPERTS, drop_ratio=0.5), "mixture"))

    return make


def model_at(path):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True, trust_remote_code=True
    )
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(**example_inputs("llama")).logits


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("blocks", [2, 4])
def test_a_tied_mixture_computes_what_its_unrolled_form_does(name, blocks, mixture, write):
    base = mixture(name)
    tied = write(tie(base, blocks=blocks), "tied")
    dense = write(tie(base, blocks=blocks, format="dense"), "dense")
    assert torch.equal(logits(model_at(tied)), logits(model_at(dense)))
    untied = write(untie(open_checkpoint(tied)), "untied")
    assert torch.equal(logits(model_at(untied)), logits(model_at(dense)))


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_and_router_are_shared_and_norms_are_not(name, mixture, write):
    model = model_at(write(tie(mixture(name), blocks=2)))
    layers = model.model.layers
    first, second = layers[0].mlp, layers[2].mlp
    assert first.experts.gate_up_proj.data_ptr() == second.experts.gate_up_proj.data_ptr()
    assert first.experts.down_proj.data_ptr() == second.experts.down_proj.data_ptr()
    assert first.gate.weight.data_ptr() == second.gate.weight.data_ptr()
    norms = [layer.post_attention_layernorm.weight for layer in (layers[0], layers[2])]
    assert not torch.equal(*norms)


def test_a_tied_mixture_is_saved_and_loaded_again(mixture, write, tmp_path):
    model = model_at(write(tie(mixture("llama"), blocks=2)))
    model.save_pretrained(tmp_path / "again")
    stored = open_checkpoint(tmp_path / "again").tensors
    assert not [name for name in stored if name.startswith("model.layers.2.block_sparse")]
    assert torch.equal(logits(model_at(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("length", [3, 12])
def test_greedy_decoding_of_a_tied_mixture_needs_no_cache(name, length, mixture, write):
    model = model_at(write(tie(mixture(name), blocks=2)))
    start = example_inputs("llama")["input_ids"][:1, :length]
    made = [
        model.generate(start, max_new_tokens=8, do_sample=False, use_cache=cached, pad_token_id=0)
        for cached in (True, False)
    ]
    assert torch.equal(*made)


def test_experts_get_no_factors(mixture):
    with pytest.raises(PlanError, match="4 experts a layer, which get no factors"):
        relax(mixture("llama"), blocks=2, rank=4)
