"""The factored model class: loads whole, generates, trains, saves, and no stock class takes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from recursion import open_tied as open_model
from recursion import prompt
from safetensors.torch import load_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from growth.factor.plan import factor
from structures import build
from surgery.checkpoint import open_checkpoint
from surgery.models.modeling_factored import FactoredLinear
from surgery.run import run

METHODS = ("svd", "monarch", "sparse-low-rank")
FAMILIES = ("llama_bias", "qwen3", "gemma3_text", "gpt2")
CASES = [(family, method) for family in FAMILIES for method in METHODS]
REFUSED = r"factored model|id2label"
FRESH = """
import sys, torch, transformers
model, info = transformers.AutoModelForCausalLM.from_pretrained(
    sys.argv[1], trust_remote_code=True, output_loading_info=True)
told = [info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")]
ids = torch.tensor([[5, 6, 7, 8]])
print([len(keys) for keys in told], model(ids).logits.double().sum().item())
"""


@pytest.fixture(scope="module")
def factored(tmp_path_factory):
    """A factored directory by family and method, written once."""
    made = {}

    def get(family, method):
        if (family, method) not in made:
            folder = tmp_path_factory.mktemp("factored")
            base = open_checkpoint(build(family, folder / "stock"))
            made[family, method] = run(factor(base, method=method, rank=3), folder / "out").out
        return made[family, method]

    return get


@pytest.fixture(scope="module")
def loaded(factored):
    """The loaded model, for tests that leave it as it is."""
    made = {}

    def get(family, method):
        key = family, method
        if key not in made:
            made[key] = open_model(factored(*key)).eval()
        return made[key]

    return get


@pytest.mark.parametrize(("family", "method"), CASES)
def test_every_stored_tensor_finds_its_place(factored, family, method):
    _, info = open_model(factored(family, method), output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize(("family", "method"), CASES)
def test_its_maps_compute_what_their_one_matrix_does(loaded, family, method):
    for module in loaded(family, method).modules():
        if isinstance(module, FactoredLinear) or hasattr(module, "factor_A"):
            x = torch.randn(2, 3, module.in_features, generator=torch.Generator().manual_seed(1))
            expected = torch.nn.functional.linear(x, module.weight, module.bias)
            with torch.no_grad():
                assert torch.allclose(module(x), expected, atol=1e-4)


@pytest.mark.parametrize("family", ["llama_bias", "gpt2"])
def test_biases_stay(loaded, family):
    held = [m for m in loaded(family, "svd").modules() if hasattr(m, "factor_A")]
    assert held
    assert all(m.bias is not None and m.bias.abs().max() > 0 for m in held)


@pytest.mark.parametrize(("family", "method"), CASES)
def test_it_generates_the_same_with_and_without_cache(loaded, family, method):
    model, ids = loaded(family, method), prompt(family)
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 257}
    cached, plain = (model.generate(ids, use_cache=u, **asked) for u in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_process_loads_it_whole(factored, loaded, method):
    path = factored("llama_bias", method)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(path.parent / "home")}
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(path)],
        capture_output=True, text=True, timeout=120, env=env, cwd=path.parent, check=True,
    )  # fmt: skip
    with torch.no_grad():
        logits = loaded("llama_bias", method)(torch.tensor([[5, 6, 7, 8]])).logits
    assert done.stdout.split() == ["[0,", "0,", "0]", str(logits.double().sum().item())]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_saved_again_it_is_the_same_model(factored, loaded, tmp_path, family, method):
    path, model = factored(family, method), loaded(family, method)
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(p / "model.safetensors") for p in (path, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    told = [json.loads((p / "config.json").read_text()) for p in (path, tmp_path / "again")]
    assert told[0]["factored"] == told[1]["factored"]
    again, info = open_model(tmp_path / "again", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert torch.equal(again(prompt(family)).logits, model(prompt(family)).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_places_stay_integers_in_any_dtype(factored, dtype):
    path = factored("llama_bias", "sparse-low-rank")
    model = open_model(path, dtype=dtype)
    stored = load_file(path / "model.safetensors")
    for name, buffer in model.named_buffers():
        if name.endswith("sparse_places"):
            assert torch.equal(buffer, stored[name])
    assert "sparse_places" not in " ".join(dict(model.named_parameters()))


@pytest.mark.parametrize("method", METHODS)
def test_it_learns_and_every_factor_gets_a_gradient(factored, method):
    model = open_model(factored("llama_bias", method)).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids, losses = prompt("llama_bias"), []
    for _ in range(5):
        loss = model(ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    factors = {n: p for n, p in model.named_parameters() if "factor_" in n or "sparse_" in n}
    assert len(factors) == 28 * (3 if method == "sparse-low-rank" else 2)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in factors.values())


def test_checkpointed_activations_give_the_same_gradients(factored):
    grads = []
    for checkpointed in (False, True):
        model = open_model(factored("llama_bias", "monarch")).train()
        if checkpointed:
            old = model.gradient_checkpointing_enable
            getattr(model, "activation_checkpointing_enable", old)()
        ids = prompt("llama_bias")
        model(ids, labels=ids).loss.backward()
        grads.append(model.model.layers[1].mlp.up_proj.factor_A.grad)
    assert torch.allclose(*grads, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_made_from_a_config_alone_it_starts_from_finite_numbers(factored, method):
    path = factored("llama_bias", method)
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    with torch.no_grad():
        logits = model(prompt("llama_bias")).logits
    assert logits.isfinite().all()
    held = [m for m in model.modules() if hasattr(m, "factor_A")]
    assert all(m.factor_A.abs().max() > 0 and m.factor_B.abs().max() > 0 for m in held)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma3_text"])
def test_stock_configs_refuse_it(factored, name):
    with pytest.raises(Exception, match=REFUSED):
        CONFIG_MAPPING[name].from_pretrained(factored("llama_bias", "svd"))


def test_stock_classes_refuse_it(factored):
    path = factored("llama_bias", "svd")
    with pytest.raises(Exception, match=REFUSED):
        transformers.LlamaForCausalLM.from_pretrained(path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"kind": "tucker", "rank": 1}, "is none of"),
        ({"kind": "low-rank", "rank": 0}, "no number above 0"),
        ({"kind": "monarch", "rank": 1, "blocks": [5, 7]}, "do not divide"),
        ({"kind": "sparse-low-rank", "rank": 1, "entries": 0}, "entries of a map"),
    ],
)
def test_configs_that_make_no_sense_are_refused(factored, told, words):
    path = factored("llama_bias", "svd")
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=True)
    config.factored = {"model.layers.0.mlp.up_proj": told}
    with pytest.raises(ValueError, match=words):
        transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)


def test_a_name_that_is_no_map_is_refused(factored):
    path = factored("llama_bias", "svd")
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=True)
    config.factored = {"model.norm": {"kind": "low-rank", "rank": 1}}
    with pytest.raises(ValueError, match="no linear map"):
        transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
