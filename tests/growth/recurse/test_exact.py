"""What recursive models compute, after save and reload."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from recurse_models import FAMILIES, load_whole, logits_of
from safetensors import safe_open

from growth.recurse.loops import INITS, SCHEMES
from growth.recurse.unroll import materialize, untie
from structures import example_inputs
from surgery.checkpoint import open_checkpoint

pytestmark = pytest.mark.filterwarnings(  # peft's own
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
CLOSE = 1e-4
LOW = 3


def difference(a, b):
    return float((a - b).abs().max())


def stored(path):
    with safe_open(path / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("name", FAMILIES)
def test_full_rank_computes_what_the_model_did(name, init, relaxed, stock_logits):
    made = load_whole(relaxed(name, init=init))
    assert difference(logits_of(made, name), stock_logits(name)) <= CLOSE


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("svd", ["gram", "exact"])
def test_every_scheme_and_method_is_exact_at_full_rank(scheme, svd, relaxed, stock_logits):
    made = load_whole(relaxed("llama", scheme=scheme, svd=svd))
    assert difference(logits_of(made, "llama"), stock_logits("llama")) <= CLOSE


def test_tied_norms_are_what_no_rank_makes_up_for(relaxed, stock_logits):
    made = load_whole(relaxed("llama", tie_norms=True))
    assert difference(logits_of(made, "llama"), stock_logits("llama")) > 100 * CLOSE


@pytest.mark.parametrize("name", FAMILIES)
def test_materialized_computes_what_the_recursive_model_does(name, relaxed, write):
    path = relaxed(name, rank=LOW)
    dense = load_whole(write(materialize(open_checkpoint(path))))
    assert type(dense).__module__.startswith("transformers.models.")
    assert difference(logits_of(dense, name), logits_of(load_whole(path), name)) <= CLOSE


@pytest.mark.parametrize("tie_norms", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_tied_model_materializes_to_copies(name, tie_norms, tied, write):
    path = tied(name, tie_norms=tie_norms)
    dense = write(materialize(open_checkpoint(path)))
    before, after = stored(path), stored(dense)
    for rest in ("self_attn.q_proj.weight", "mlp.down_proj.weight"):
        first = before[f"model.layers.0.{rest}"]
        assert torch.equal(after[f"model.layers.0.{rest}"], first)
        assert torch.equal(after[f"model.layers.2.{rest}"], first)
    assert difference(logits_of(load_whole(dense), name), logits_of(load_whole(path), name)) == 0


@pytest.mark.parametrize("make", ["relaxed", "tied"])
def test_the_dense_format_is_the_materialized_model(make, request, write):
    get = request.getfixturevalue(make)
    asked = {"rank": LOW} if make == "relaxed" else {}
    dense = stored(get("llama", format="dense", **asked))
    made = stored(write(materialize(open_checkpoint(get("llama", **asked)))))
    assert dense.keys() == made.keys()
    assert all(torch.equal(dense[name], made[name]) for name in dense)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_stock_config_comes_back(name, relaxed, structure, write):
    made = open_checkpoint(write(materialize(open_checkpoint(relaxed(name, rank=LOW)))))
    assert made.config == open_checkpoint(structure(name)).config
    shapes = {n: t.shape for n, t in open_checkpoint(structure(name)).tensors.items()}
    assert {n: t.shape for n, t in made.tensors.items()} == shapes


@pytest.mark.parametrize("name", FAMILIES)
def test_an_untied_model_takes_its_factors_back_from_peft(name, relaxed, write):
    from peft import PeftModel

    path = relaxed(name, rank=LOW)
    base = write(untie(open_checkpoint(path), part="base"))
    adapter = write(untie(open_checkpoint(path), part="adapter"))
    joined = PeftModel.from_pretrained(load_whole(base), adapter).eval()
    expected = logits_of(load_whole(path), name)
    assert difference(logits_of(joined, name), expected) <= CLOSE
    assert difference(logits_of(joined.merge_and_unload(), name), expected) <= CLOSE


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["llama", "mistral", "llama_tied"])
def test_the_peft_format_reproduces_the_model(name, scheme, relaxed, stock_logits):
    from peft import PeftModel

    asked = {"format": "peft", "scheme": scheme}
    base = load_whole(relaxed(name, part="base", **asked))
    blocks = 3 if scheme == "middle-cycle" else 2
    assert base.config.num_hidden_layers == blocks
    joined = PeftModel.from_pretrained(base, relaxed(name, part="adapter", **asked)).eval()
    assert joined.config.num_hidden_layers == 4
    assert difference(logits_of(joined, name), stock_logits(name)) <= CLOSE


def test_the_peft_format_with_tied_norms_is_the_tied_form(relaxed):
    from peft import PeftModel

    asked = {"tie_norms": True, "rank": LOW}
    base = load_whole(relaxed("llama", format="peft", part="base", **asked))
    adapter = relaxed("llama", format="peft", part="adapter", **asked)
    joined = PeftModel.from_pretrained(base, adapter).eval()
    expected = logits_of(load_whole(relaxed("llama", **asked)), "llama")
    assert difference(logits_of(joined, "llama"), expected) <= CLOSE


@pytest.mark.parametrize("name", FAMILIES)
def test_each_shared_tensor_is_stored_once(name, relaxed, structure):
    path = relaxed(name, rank=LOW)
    loops, parent = 2, stored(structure(name))
    weights = {n for n in stored(path) if n.endswith("_proj.weight")}
    assert {int(n.split(".")[2]) for n in weights} == {0, 1}
    assert loops * len(weights) == sum(n.endswith("_proj.weight") for n in parent)
    norms = {n for n in stored(path) if "norm" in n}
    assert norms == {n for n in parent if "norm" in n}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tokens", [5, 12])
def test_greedy_decoding_is_the_same_without_a_cache(name, tokens, relaxed):
    model = load_whole(relaxed(name, rank=LOW))
    rows = example_inputs(name)["input_ids"][:1, :tokens]
    asked = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    mask = torch.ones_like(rows)
    with_cache = model.generate(rows, attention_mask=mask, use_cache=True, **asked)
    assert torch.equal(
        with_cache, model.generate(rows, attention_mask=mask, use_cache=False, **asked)
    )


def test_a_fresh_process_loads_it_tied(relaxed):
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
first, third = (model.model.layers[n].mlp.up_proj.weight for n in (0, 2))
assert first.data_ptr() == third.data_ptr()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, relaxed("llama", rank=LOW)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
