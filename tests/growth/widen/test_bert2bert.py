"""FPI and AKI take whole heads and units as the paper says, told here by plain indexing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from layer_oracle import logits, stored

from growth.dimensions import find_dimensions
from growth.widen import widen
from growth.widen.asked import plan_widths
from growth.widen.maps import balanced
from structures import load
from surgery.checkpoint import open_checkpoint

NO_CHOICE = {"factor": None, "inner": None, "noise": 0.0}


def choices(base, **options):
    """The widening's own choice of units: hidden, and key-value heads and units by layer."""
    found = find_dimensions(base)
    how = plan_widths(found, **NO_CHOICE | options)

    def units(kind, layer=None):
        sizes = {"hidden": found.hidden, "key": found.heads.keys, "ffn": 48}
        return torch.from_numpy(how.sources(kind, sizes[kind], layer))

    return units


@pytest.mark.parametrize(("units", "new"), [(4, 4), (4, 6), (4, 8), (4, 11), (1, 3)])
def test_all_units_come_first_and_numbers_of_copies_differ_by_one_at_most(units, new):
    made = balanced(units, new, "seed")
    assert len(made) == new
    assert made[:units].tolist() == list(range(units))
    counts = np.bincount(made)
    assert counts.max() - counts.min() <= 1


def test_the_choice_is_random_and_repeats_with_its_seed():
    drawn = [balanced(64, 96, seed).tolist() for seed in ("a", "b", "a")]
    assert drawn[0] == drawn[2] != drawn[1]


def rows_of_heads(heads, width=8):
    return (heads[:, None] * width + torch.arange(width)).flatten()


def test_fpi_copies_outputs_and_divides_inputs(opened, structure, write):
    base = opened("llama")
    units = choices(base, to=48, method="fpi", seed=7)
    old = stored(structure("llama"))
    new = stored(write(widen(base, to=48, seed=7)))
    hidden = units("hidden")
    count = torch.bincount(hidden)[hidden]
    for layer in range(4):
        keys, inner = units("key", layer), units("ffn", layer)
        queries = (keys[:, None] * 2 + torch.arange(2)).flatten()
        times = torch.bincount(queries)[queries].repeat_interleave(8)
        at = f"model.layers.{layer}"
        wanted = {
            "self_attn.q_proj": lambda w, q=queries: w[rows_of_heads(q)][:, hidden] / count,
            "self_attn.v_proj": lambda w, k=keys: w[rows_of_heads(k)][:, hidden] / count,
            "self_attn.o_proj": lambda w, q=queries, t=times: w[hidden][:, rows_of_heads(q)] / t,
            "mlp.up_proj": lambda w, n=inner: w[n][:, hidden] / count,
            "mlp.down_proj": lambda w, n=inner: w[hidden][:, n] / torch.bincount(n)[n],
            "input_layernorm": lambda w: w[hidden],
        }
        for name, make in wanted.items():
            full = f"{at}.{name}.weight"
            torch.testing.assert_close(new[full], make(old[full]), rtol=1e-6, atol=0)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    torch.testing.assert_close(new[head], old[head][:, hidden] / count, rtol=1e-6, atol=0)
    assert torch.equal(new[embedding], old[embedding][:, hidden])


@pytest.mark.parametrize("name", ["llama_bias", "gpt2", "bert"])
def test_aki_takes_the_copies_of_outputs_from_the_next_layer(name, opened, write):
    """Old rows are as in FPI; the others are what the next layer's own FPI would have there."""
    base = opened(name)
    places = {
        "llama_bias": "model.layers.{}.mlp.gate_proj.{}",
        "gpt2": "transformer.h.{}.mlp.c_fc.{}",
        "bert": "bert.encoder.layer.{}.attention.self.query.{}",
    }
    units = {"llama_bias": 48, "gpt2": 128, "bert": 32}[name]
    fpi = stored(write(widen(base, to=64)))
    aki = stored(write(widen(base, to=64, method="aki")))

    def outputs(tensors, layer, leaf):
        found = tensors[places[name].format(layer, leaf)]
        return found.T if name == "gpt2" and leaf == "weight" else found

    for leaf in ("weight", "bias"):
        for layer in range(4):
            made = outputs(aki, layer, leaf)
            assert torch.equal(made[:units], outputs(fpi, layer, leaf)[:units])
            above = {tuple(row.flatten().tolist()) for row in outputs(fpi, min(layer + 1, 3), leaf)}
            assert {tuple(row.flatten().tolist()) for row in made[units:]} <= above
    norms = [n for n in fpi if "norm" in n.lower() or "ln_" in n]
    assert norms
    assert all(torch.equal(fpi[n], aki[n]) for n in norms)


def bits(path, fixtures_dir):
    import transformers
    from safetensors.torch import load_file

    rows = load_file(fixtures_dir / "heldout" / "mix.safetensors")["rows"].long()[:16]
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return float(model(input_ids=rows, labels=rows).loss)


def test_a_trained_model_stays_near_and_aki_is_nearer_than_chance(fixtures_dir, write):
    base = open_checkpoint(fixtures_dir / "base")
    before = bits(fixtures_dir / "base", fixtures_dir)
    near = bits(write(widen(base, to=160)), fixtures_dir)
    apart = bits(write(widen(base, to=160, method="aki")), fixtures_dir)
    assert abs(near - before) < 0.02 * before
    assert near < apart < 0.5 * np.log(1024)


def test_an_uneven_width_is_near_and_says_so(opened, write, parent):
    plan = widen(opened("bert"), to=48)
    assert any("near and not the same" in note for note in plan.notes)
    model, info = load("bert", write(plan))
    assert not any(info.values())
    before = logits(parent("bert"))
    assert 1e-3 < (logits(model) - before).std() < before.std()


def test_an_even_width_has_nothing_to_say(opened):
    assert widen(opened("bert"), to=64).notes == ()
