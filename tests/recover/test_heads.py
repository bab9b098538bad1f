"""Heads of transformers' models, and the states that go into them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from architectures import ARCHITECTURES
from surgery.errors import RecipeError, SurgeryError, TrainError
from surgery.models.modeling_recursive import RecursiveConfig, RecursiveForCausalLM
from surgery.recover.heads import head_of, states_of
from surgery.recover.losses import Objective

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
KINDS: dict[str, tuple[str, dict[str, Any], float, float | None]] = {
    "llama": ("llama", {}, 1.0, None),
    "tied": ("llama", {"tie_word_embeddings": True}, 1.0, None),
    "gemma2": ("gemma2", {"head_dim": 8, "final_logit_softcapping": 30.0}, 1.0, 30.0),
    "gemma3": ("gemma3_text", {"head_dim": 8, "final_logit_softcapping": None}, 1.0, None),
    "cohere": ("cohere", {"logit_scale": 0.0625}, 0.0625, None),
    "cohere2": ("cohere2", {"logit_scale": 0.25}, 0.25, None),
    "granite": ("granite", {"logits_scaling": 8.0}, 1 / 8, None),
    "hyperclovax": ("hyperclovax", {"logits_scaling": 0.125}, 0.125, None),
    "phi": ("phi", {}, 1.0, None),
    "minicpm3": (
        "minicpm3",
        {
            "dim_model_base": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "head_dim": 8,
            "num_key_value_heads": 4,
        },
        1.0,
        None,
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        {"logits_soft_cap": 20.0, "head_dim": 8, "lru_width": 32, "num_hidden_layers": 3},
        1.0,
        20.0,
    ),
}


def make(kind: str) -> Any:
    model_type, extra, *_ = KINDS[kind]
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[model_type](**(SMALL | extra))
    return randomised(transformers.AutoModelForCausalLM.from_config(config))


def randomised(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def feed() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    ids = torch.arange(16).view(2, 8) + 3
    return {"input_ids": ids}, torch.arange(16).view(2, 8) % 5 > 0


@pytest.mark.parametrize("kind", list(KINDS))
def test_head_and_states_give_the_models_own_logits(kind: str) -> None:
    model = make(kind)
    inputs, keep = feed()
    head = head_of(model)
    with torch.no_grad():
        states = states_of(model, inputs, keep)
        wanted = model(**inputs).logits[keep]
    assert (head.scale, head.softcap) == KINDS[kind][2:]
    torch.testing.assert_close(head.logits(states.hidden), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", [n for n, s in ARCHITECTURES.items() if s.decoder and s.auto == "AutoModelForCausalLM"]
)
def test_the_families_of_the_fixtures_have_heads(name: str) -> None:
    structure = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[structure.model_type](**structure.config)
    model = randomised(transformers.AutoModelForCausalLM.from_config(config))
    inputs, keep = feed()
    with torch.no_grad():
        found = head_of(model).logits(states_of(model, inputs, keep).hidden)
        wanted = model(**inputs).logits[keep]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def test_the_gradients_are_those_of_the_models_own_loss() -> None:
    model = make("gemma2")
    inputs, keep = feed()
    targets = inputs["input_ids"].roll(-1, 1)
    logits = model(**inputs).logits[keep]
    nn.functional.cross_entropy(logits, targets[keep], reduction="sum").backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    states = states_of(model, inputs, keep)
    Objective({"ce": 1.0})(states.hidden, head_of(model), targets[keep]).total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-5)


def test_the_model_is_as_before_afterwards() -> None:
    model = make("llama").train()
    inputs, keep = feed()
    before = model(**inputs).logits
    head_of(model)
    states_of(model, inputs, keep)
    assert model.training
    assert torch.equal(model(**inputs).logits, before)


def test_states_after_layers_are_those_of_transformers() -> None:
    model = make("llama")
    inputs, keep = feed()
    found = states_of(model, inputs, keep, layers=True)
    wanted = model(**inputs, output_hidden_states=True).hidden_states[1:]
    assert len(found.layers) == 2
    for one, other in zip(found.layers, wanted, strict=True):
        assert torch.equal(one, other[keep])


def test_packed_documents_do_not_see_each_other() -> None:
    model = make("llama")
    ids = torch.arange(12)[None] + 3
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    keep = torch.ones_like(ids, dtype=torch.bool)
    packed = states_of(model, {"input_ids": ids, "position_ids": positions}, keep).hidden
    apart = [
        states_of(model, {"input_ids": ids[:, cut]}, keep[:, cut]).hidden
        for cut in (slice(0, 5), slice(5, 12))
    ]
    torch.testing.assert_close(packed, torch.cat(apart), rtol=1e-4, atol=1e-5)


def recursive(layer_map: list[int]) -> Any:
    torch.manual_seed(0)
    fields = SMALL | {"num_hidden_layers": len(layer_map)}
    config = RecursiveConfig(base_model_type="llama", layer_map=layer_map, **fields)
    return randomised(RecursiveForCausalLM(config))


def test_exits_of_a_recursive_model_are_what_fewer_loops_compute() -> None:
    model = recursive([0, 1, 0, 1, 0, 1])
    inputs, keep = feed()
    with torch.no_grad():
        states = states_of(model, inputs, keep, loops=True)
        head = head_of(model)
        for number, state in enumerate(states.loops, start=1):
            wanted = model(**inputs, num_loops=number).logits[keep]
            torch.testing.assert_close(head.logits(state), wanted, rtol=1e-4, atol=1e-4)
    assert len(states.loops) == 2


class Odd(transformers.LlamaForCausalLM):
    """Adds to its logits what no config tells."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 7
        return output


def adapted(**settings: Any) -> Any:
    """A model with adapters."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():  # peft asks transformers by a name that is going away
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(make("llama"), LoraConfig(**settings))


def wrong(case: str) -> None:
    inputs, keep = feed()
    if case == "odd":
        head_of(Odd(make("llama").config))
    elif case == "adapter":
        head_of(adapted(target_modules=["lm_head"]))
    elif case == "no loops":
        states_of(make("llama"), inputs, keep, loops=True)
    else:
        states_of(recursive([0, 1, 0, 1, 2]), inputs, keep, loops=True)


@pytest.mark.parametrize(
    ("case", "kind", "fact"),
    [
        ("odd", TrainError, "does to its logits what is not known here"),
        ("adapter", TrainError, "has no plain linear head"),
        ("no loops", RecipeError, "the student has no loops"),
        ("layers after", RecipeError, "layers follow the student's loops"),
    ],
)
def test_what_has_no_head_or_exit_is_refused(
    case: str, kind: type[SurgeryError], fact: str
) -> None:
    with pytest.raises(kind, match=fact):
        wrong(case)


def test_a_head_that_peft_trains_whole_is_the_trained_copy() -> None:
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    head = head_of(model)
    assert head.weight.requires_grad
    assert head.renewed(model).weight is head.weight
