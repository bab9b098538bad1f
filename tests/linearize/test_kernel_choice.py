"""Which layers take kernels: by the spec, by a call, in every mode."""

from __future__ import annotations

import pytest
import torch

from linearize.kernel_stand_ins import B, drawn
from surgery.linearize.config import linearized_config
from surgery.linearize.methods import METHODS, full_spec
from surgery.linearize.parameters import Sizes
from surgery.models import linear_fla, linear_kernels
from surgery.models.linear_gated import GATED
from surgery.models.linear_kernels import use_kernels
from surgery.models.linear_mixers import MIXERS
from surgery.models.linear_seen import Past, Seen, Shape
from surgery.models.modeling_linearized import LinearizedConfig, LinearizedForCausalLM

SIZES = Sizes(hidden=12, heads=4, kv_heads=2, head_dim=6)
SHAPE = Shape(hidden=12, heads=4, kv_heads=2, head_dim=6, scale=6**-0.5)


def mixer(method, **more):
    torch.manual_seed(0)
    window = {"window": 4} if "window" in METHODS[method].options else {}
    spec = full_spec(METHODS[method], window, SIZES) | more
    made = {**MIXERS, **GATED}[method](spec, SHAPE)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return made


def seen(t, docs=None):
    q, k, v = drawn(B, 2, 2, t, 6), drawn(B, 2, 1, t, 6), drawn(B, 2, 1, t, 6)
    return Seen(drawn(B, t, 12), q, k, v, q, k, docs)


SUMMING = {
    "lolcats": "none",
    "hedgehog": "none",
    "t2r": "none",
    "based": "none",
    "lizard": "scalar",
    "liger": "vector",
    "gla": "vector",
    "gated-delta": "delta",
}


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("method", SUMMING)
def test_a_mixer_takes_the_kernels_of_its_spec_in_every_mode(package, method, padded):
    own, other = mixer(method), mixer(method, kernels="fla")
    docs = torch.tensor([[0] * 9, [-1] * 3 + [0] * 6]) if padded else None
    with torch.no_grad():
        pasts = Past(), Past()
        for t in (9, 1, 5):
            given = seen(t, docs if t == 9 else None)
            wanted, found = own(given, pasts[0]), other(given, pasts[1])
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
            assert bool(package.called) == (t != 9 or not padded)
    kernel = linear_fla.FLA[SUMMING[method]]
    assert {kernel.chunk, kernel.step} == set(package.called)


def test_every_method_that_sums_has_its_kernel():
    assert {*SUMMING, "swa-sink"} == set(METHODS)


def test_a_call_chooses_for_all_layers_and_back(package):
    model = torch.nn.ModuleList([mixer("gla"), mixer("gla")])
    use_kernels(model, "fla")
    assert [module.kernels for module in model] == ["fla", "fla"]
    use_kernels(model, "torch")
    assert [module.kernels for module in model] == ["torch", "torch"]


def test_an_unknown_choice_in_the_spec_is_refused():
    with pytest.raises(ValueError, match="kernels cuda is none of torch, fla"):
        mixer("gla", kernels="cuda")


@pytest.mark.parametrize(
    ("name", "devices", "there", "match"),
    [
        ("cuda", ("cpu",), True, "cuda is none of torch, fla"),
        ("fla", ("cuda",), True, "fla runs on CUDA, and the model is on cpu"),
        ("fla", ("cpu",), False, "flash-linear-attention is not installed"),
    ],
)
def test_a_call_that_cannot_be_met_is_refused(monkeypatch, name, devices, there, match):
    monkeypatch.setattr(linear_kernels, "DEVICES", devices)
    monkeypatch.setattr(linear_kernels, "installed", lambda: there)
    with pytest.raises(ValueError, match=match):
        use_kernels(mixer("gla"), name)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match="the model has no linear layer"):
        use_kernels(torch.nn.Linear(2, 2), "torch")


@pytest.mark.gpu
@pytest.mark.parametrize("method", SUMMING)
def test_a_model_on_the_real_kernels_reads_and_goes_on_as_with_the_torch_form(method):
    pytest.importorskip("fla.ops.gla")
    model, ids = tiny(method).cuda(), torch.randint(97, (2, 81), device="cuda")
    found = []
    for kernels in ("torch", "fla"):
        use_kernels(model, kernels)
        with torch.no_grad():
            read = model(ids[:, :80], use_cache=True)
            last = model(ids[:, 80:], past_key_values=read.past_key_values)
        found.append(torch.cat((read.logits, last.logits), 1))
    assert float((found[1] - found[0]).norm() / found[0].norm()) < linear_fla.OUTPUTS


def tiny(method):
    stock = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 97,
    }
    sizes = Sizes(hidden=64, heads=4, kv_heads=2, head_dim=16)
    spec = full_spec(METHODS[method], {}, sizes)
    told = linearized_config(stock, linear_layers=[0, 1], mixer=spec)
    return LinearizedForCausalLM(LinearizedConfig.from_dict(told)).eval()


def test_a_call_reaches_every_linear_layer_of_a_model(package):
    model, ids = tiny("gla"), torch.randint(97, (1, 70))
    with torch.no_grad():
        wanted = model(ids).logits
        use_kernels(model, "fla")
        torch.testing.assert_close(model(ids).logits, wanted, atol=1e-4, rtol=0)
    assert package.called.count("chunk_gla") == 3  # the check, and two layers
    assert "kernels" not in model.config.mixer
