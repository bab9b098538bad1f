"""Expansion computes exactly the same function, on every decoder, or is refused with the reason."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from layer_oracle import generated, logits, same_bits, source_name, stored, text_of

from growth.expand import expand
from structures import LAYERS, STRUCTURES, is_decoder, load
from surgery.checkpoint import open_checkpoint
from surgery.errors import PlanError, RecipeError

DECODERS = [name for name in STRUCTURES if is_decoder(name)]
MAPS = {
    1: [0, 1, 2, 3, 3],
    2: [0, 1, 1, 2, 3, 3],
    3: [0, 0, 1, 1, 2, 3, 3],
    4: [0, 0, 1, 1, 2, 2, 3, 3],
}
NEW = {1: [4], 2: [2, 5], 3: [1, 3, 6], 4: [1, 3, 5, 7]}
CASES = [(name, blocks) for name in DECODERS for blocks in MAPS]

TINY = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 256, "eos_token_id": 256,
    "pad_token_id": 257, "max_position_embeddings": 64,
}  # fmt: skip
GPT = {"vocab_size": 264, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
STATE = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8}
OPT = {**TINY, "ffn_dim": 48, "word_embed_proj_dim": 32}
GRIFFIN = {**TINY, "lru_width": 32, "attention_window_size": 8}
# Further ways to build a layer: one branch, a recurrent branch, a convolution.
EXACT = {
    "mamba": STATE,
    "falcon_mamba": STATE,
    "recurrent_gemma": GRIFFIN,
    "gptj": GPT | {"rotary_dim": 8},
    "opt": OPT,
    "bloom": TINY | {"n_layer": 3, "n_head": 4},
    "lfm2": TINY | {"layer_types": ["conv", "full_attention", "conv"]},
    "gpt_neo": TINY
    | {"num_layers": 3, "num_heads": 4, "attention_types": [[["global", "local", "global"], 1]]},
}
# Layers that change the stream even when their branches add nothing.
REFUSED = {
    "openai-gpt": (GPT, "normalises after each residual sum"),
    "opt": (OPT | {"do_layer_norm_before": False}, "do_layer_norm_before = False"),
    "bloom": (
        TINY | {"n_layer": 3, "n_head": 4, "apply_residual_connection_post_layernorm": True},
        "apply_residual_connection_post_layernorm = True",
    ),
    "doge": (TINY, r"mixes the residual stream \(input_residual\)"),
    "xlnet": ({"vocab_size": 264, "d_model": 32, "n_layer": 3, "n_head": 4}, "last projection"),
}


@pytest.fixture(scope="session")
def expanded(opened, write):
    """Path, model and loading info of an expanded structure."""
    made = {}

    def get(name, blocks):
        if (name, blocks) not in made:
            path = write(expand(opened(name), blocks=blocks))
            made[name, blocks] = (path, *load(name, path))
        return made[name, blocks]

    return get


@pytest.fixture
def tiny(tmp_path):
    """A random checkpoint of any decoder in transformers, written and loaded back."""

    def make(family, config):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            made = transformers.AutoConfig.for_model(family, **config)
            model = transformers.AutoModelForCausalLM.from_config(made)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn(parameter.shape), alpha=0.1)
        model.save_pretrained(tmp_path / "base")
        return open_checkpoint(tmp_path / "base"), _load(tmp_path / "base")

    return make


def _load(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.mark.parametrize(("name", "blocks"), CASES)
def test_logits_are_exactly_the_same_after_save_and_reload(name, blocks, expanded, parent):
    _, model, _ = expanded(name, blocks)
    assert (logits(model) - logits(parent(name))).abs().max() == 0.0


@pytest.mark.parametrize(("name", "blocks"), CASES)
def test_generates_the_same_with_a_cache(name, blocks, expanded, parent):
    assert generated(expanded(name, blocks)[1]) == generated(parent(name))


@pytest.mark.parametrize(("name", "blocks"), CASES)
def test_loads_with_no_missing_unexpected_or_mismatched_key(name, blocks, expanded):
    assert {key: value for key, value in expanded(name, blocks)[2].items() if value} == {}


@pytest.mark.parametrize(("name", "blocks"), CASES)
def test_old_layers_are_untouched_and_new_ones_differ_only_in_zeros(
    name, blocks, expanded, structure
):
    before, after = stored(structure(name)), stored(expanded(name, blocks)[0])
    changed = {n for n in after if not same_bits(after[n], before[source_name(n, MAPS[blocks])])}
    assert changed
    assert all(not after[n].any() for n in changed)
    assert {source_name(n, range(9)) for n in changed} == changed
    layers = {int(next(word for word in n.split(".") if word.isdigit())) for n in changed}
    assert layers == set(NEW[blocks])


@pytest.mark.parametrize("blocks", MAPS)
def test_the_record_names_the_trainable_layers(blocks, expanded):
    facts = json.loads((expanded("llama", blocks)[0] / "surgery.json").read_text())["facts"]
    assert facts == {"layer_map": MAPS[blocks], "trainable_layers": NEW[blocks]}


@pytest.mark.parametrize(("name", "blocks"), [("gemma3_text", 2), ("qwen3_next", 3), ("qwen2", 3)])
def test_a_new_block_is_of_its_sources_kind(name, blocks, expanded, parent):
    before = text_of(parent(name).config).layer_types
    after = text_of(expanded(name, blocks)[1].config).layer_types
    assert after == [before[i] for i in MAPS[blocks]]


def test_new_blocks_are_spread_evenly(opened):
    plan = expand(opened("llama"), blocks=1)
    assert plan.facts["layer_map"] == [*range(LAYERS), LAYERS - 1]


def test_new_blocks_can_learn(expanded):
    """Gradients reach the zeroed projections, so that training moves them."""
    _, model, _ = expanded("llama", 2)
    batch = {"input_ids": torch.arange(12)[None], "labels": torch.arange(12)[None]}
    model(**batch).loss.backward()
    for layer in NEW[2]:
        assert model.model.layers[layer].self_attn.o_proj.weight.grad.abs().max() > 0
        assert model.model.layers[layer].mlp.down_proj.weight.grad.abs().max() > 0
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("family", EXACT)
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_other_ways_to_build_a_layer_are_exact(family, blocks, tiny, write):
    base, model = tiny(family, EXACT[family])
    grown = _load(write(expand(base, blocks=blocks)))
    assert (logits(grown) - logits(model)).abs().max() == 0.0


@pytest.mark.parametrize("family", REFUSED)
def test_layers_that_cannot_be_the_identity_are_refused(family, tiny):
    config, why = REFUSED[family]
    with pytest.raises(PlanError, match=why):
        expand(tiny(family, config)[0], blocks=1)


def test_bert_is_refused_with_the_reason(opened):
    with pytest.raises(PlanError, match="normalises after each residual sum") as refused:
        expand(opened("bert"), blocks=1)
    assert "use `surgery stack` instead" in str(refused.value)


@pytest.mark.parametrize("blocks", [0, -1, 5])
def test_a_number_of_blocks_out_of_range_is_refused(blocks, opened):
    with pytest.raises(RecipeError, match=f"--blocks {blocks}: is outside 1 to 4"):
        expand(opened("llama"), blocks=blocks)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_packed_weights_are_refused(method, structure, tmp_path):
    import shutil

    base = shutil.copytree(structure("llama"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match=f"quantised with {method}"):
        expand(open_checkpoint(base), blocks=1)


def test_an_unknown_projection_is_refused(structure, tmp_path):
    """A branch whose end is not known would keep on writing to the stream."""
    from safetensors.torch import save_file

    renamed = {n.replace("down_proj", "outlet"): t for n, t in stored(structure("llama")).items()}
    save_file(renamed, tmp_path / "model.safetensors")
    with pytest.raises(PlanError, match="no last projection by a known name in mlp"):
        expand(open_checkpoint(tmp_path / "model.safetensors"), blocks=1)
