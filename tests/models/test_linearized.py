"""A linearized model is the same function in every mode: whole, in pieces, padded, packed."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import transformers
from linearizing import CASES, METHODS, TOKENS, WINDOW, convert, in_pieces, load, logits, prompt
from safetensors.torch import load_file, save_file

from structures import load as load_stock

CLOSE = 1e-4  # of logits in float32
PIECES = (
    [1] * TOKENS,
    [5, 1, 1, 9, 7],
    [TOKENS - 1, 1],
    [2, WINDOW, WINDOW, TOKENS - 2 - 2 * WINDOW],
)


@pytest.fixture(scope="module")
def written(structure, tmp_path_factory):
    """A linearized directory by family and method, written once."""
    made = {}

    def get(family, method, **options):
        key = family, method, *options.items()
        if key not in made:
            out = tmp_path_factory.mktemp("linearized") / "out"
            made[key] = convert(structure(family), out, method, **options)
        return made[key]

    return get


@pytest.fixture(scope="module")
def linear(written):
    """A loaded linearized model by family and method."""
    made = {}

    def get(family, method, **options):
        key = family, method, *options.items()
        if key not in made:
            made[key] = load(written(family, method, **options))
        return made[key]

    return get


def close(a, b, within=CLOSE):
    return float((a - b).abs().max()) < within


def greedy(model, ids, **options):
    return model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None, **options)


@pytest.mark.parametrize(("family", "method"), CASES)
def test_a_text_in_pieces_is_the_whole_text(linear, family, method):
    model, ids = linear(family, method), prompt()
    whole = logits(model, ids)
    for pieces in PIECES:
        assert close(in_pieces(model, ids, pieces), whole), pieces


@pytest.mark.parametrize(("family", "method"), CASES)
def test_what_follows_and_the_length_change_nothing(linear, family, method):
    model, ids = linear(family, method), prompt()
    other = torch.cat((ids[:, :11], prompt(seed=1)[:, 11:]), 1)
    whole = logits(model, ids)[:, :11]
    assert close(logits(model, other)[:, :11], whole)
    for length in (11, 12, 17):
        assert close(logits(model, ids[:, :length])[:, :11], whole)


@pytest.mark.parametrize(("family", "method"), CASES)
def test_a_row_padded_on_the_left_is_the_row_alone(linear, family, method):
    model, ids = linear(family, method), prompt(rows=1)
    alone = logits(model, ids)
    for padding in (1, WINDOW, 2 * WINDOW + 1):
        padded = torch.nn.functional.pad(ids, (padding, 0), value=257)
        both = torch.cat((padded, prompt(TOKENS + padding, rows=1)))
        mask = torch.ones_like(both)
        mask[0, :padding] = 0
        assert close(logits(model, both, attention_mask=mask)[:1, padding:], alone)
        pieces = [padding + 3, 1, 1, TOKENS - 5]
        found = in_pieces(model, both, pieces, attention_mask=mask)
        assert close(found[:1, padding:], alone)


@pytest.mark.parametrize(("family", "method"), CASES)
def test_packed_documents_are_documents_alone(linear, family, method):
    model = linear(family, method)
    parts = [prompt(length, rows=1) for length in (9, 1, TOKENS, 2)]
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    packed = logits(model, torch.cat(parts, 1), position_ids=positions)
    alone = torch.cat([logits(model, part) for part in parts], 1)
    assert close(packed, alone)


@pytest.mark.parametrize(("family", "method"), CASES)
def test_generation_with_a_cache_is_generation_without(linear, family, method):
    model = linear(family, method)
    for tokens in (3, TOKENS):
        ids = prompt(tokens)
        assert torch.equal(greedy(model, ids), greedy(model, ids, use_cache=False))


@pytest.mark.parametrize("method", METHODS)
def test_beams_and_samples_with_a_cache_are_those_without(linear, method):
    model, ids = linear("llama", method), prompt()
    beams = {"num_beams": 3}
    assert torch.equal(greedy(model, ids, **beams), greedy(model, ids, use_cache=False, **beams))
    found = []
    for cached in (True, False):
        torch.manual_seed(0)
        drawn = {"do_sample": True, "eos_token_id": None, "num_return_sequences": 2}
        found.append(model.generate(ids, max_new_tokens=5, use_cache=cached, **drawn))
    assert torch.equal(*found)


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_several_lengths_generate_what_they_do_alone(linear, method):
    model, rows = linear("llama", method), [prompt(n, rows=1)[0] for n in (4, 9, TOKENS)]
    ids = torch.full((3, TOKENS), 257)
    for row, text in zip(ids, rows, strict=True):
        row[TOKENS - len(text) :] = text
    mask = (ids != 257).long()
    found = greedy(model, ids, attention_mask=mask)[:, TOKENS:]
    for row, text in zip(found, rows, strict=True):
        assert torch.equal(row, greedy(model, text[None])[0, len(text) :])


@pytest.mark.parametrize("method", METHODS)
def test_a_cache_does_not_grow(linear, method):
    model = linear("llama", method, keep=None)
    sizes = []
    for tokens in (40, 80):
        with torch.no_grad():
            cache = model(prompt(tokens), use_cache=True).past_key_values
        tensors = [kept for layer in cache.layers for kept in layer.past.tensors.values()]
        # Of storages, not of views of them: what is behind a view is kept, too.
        sizes.append(sum(kept.untyped_storage().nbytes() for kept in tensors))
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text", "olmo2"])
def test_a_window_over_the_whole_text_is_softmax_attention(written, structure, family):
    model = load(written(family, "swa-sink", window=TOKENS, sinks=0))
    stock, _ = load_stock(family, structure(family))
    window = getattr(stock.config, "sliding_window", None) or TOKENS
    ids = prompt(min(TOKENS, window))
    assert close(logits(model, ids), logits(stock, ids))


@pytest.mark.parametrize("method", ["lolcats", "gla"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2"])
def test_in_teacher_mode_it_is_the_stock_model(written, structure, family, method):
    from surgery.models.modeling_linearized import LinearizedForCausalLM, set_mode

    model = LinearizedForCausalLM.from_pretrained(
        written(family, method), dtype=torch.float32
    ).eval()
    stock, _ = load_stock(family, structure(family))
    set_mode(model, "teacher")
    assert close(logits(model, prompt()), logits(stock, prompt()))


@pytest.mark.parametrize(
    "method",
    [
        "lolcats",
        *(pytest.param(one, marks=pytest.mark.slow) for one in METHODS if one != "lolcats"),
    ],
)
def test_it_is_itself_after_saving_in_a_fresh_process(linear, method, tmp_path):
    model, ids = linear("qwen3", method), prompt()
    model.save_pretrained(tmp_path / "saved")
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    script = (
        "import sys, torch\n"
        "from safetensors.torch import load_file, save_file\n"
        "from transformers import AutoModelForCausalLM\n"
        "assert not any(name.startswith('surgery') for name in sys.modules)\n"
        "model, told = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/saved',"
        " trust_remote_code=True, dtype=torch.float32, output_loading_info=True)\n"
        "assert not any(told.values()), told\n"
        "ids = load_file(sys.argv[1] + '/ids.safetensors')['ids']\n"
        "with torch.no_grad(): found = model(ids, use_cache=False).logits\n"
        "save_file({'logits': found}, sys.argv[1] + '/logits.safetensors')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=120)
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], logits(model, ids))


@pytest.mark.parametrize("method", METHODS)
def test_activation_checkpointing_gives_the_same_gradients(written, method):
    found = []
    for saving in (False, True):
        model = load(written("llama", method)).train()
        if saving:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(prompt(), labels=prompt()).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert any(".mixer." in name for name in found[0]) or method in ("liger", "swa-sink")
    for name, gradient in found[0].items():
        assert torch.isfinite(gradient).all()
        assert torch.allclose(found[1][name], gradient, atol=1e-6), name


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft's
@pytest.mark.parametrize("method", METHODS)
def test_peft_finds_the_projections_and_not_the_mixers(linear, method):
    import peft

    model = copy.deepcopy(linear("llama", method))
    before = logits(model, prompt())
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    assert not any(".mixer." in n for n, p in adapted.named_parameters() if "lora_" in n)
    assert not close(logits(adapted, prompt()), before)
    merged = logits(adapted, prompt())
    assert close(logits(adapted.merge_and_unload(), prompt()), merged, 1e-3)


def test_no_stock_class_loads_it(written):
    path = written("llama", "lolcats")
    with pytest.raises(ValueError, match="load it with AutoModelForCausalLM and trust_remote_code"):
        transformers.LlamaForCausalLM.from_pretrained(path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda m: {"past_key_values": transformers.StaticCache(m.config, 64)}, "holds no sums"),
        (lambda m: {"attention_mask": torch.zeros(1, 1, 5, 5)}, r"masks of \[rows, tokens\]"),
        (
            lambda m: {
                "past_key_values": transformers.DynamicCache(config=m.config),
                "position_ids": torch.tensor([[0, 1, 0, 1, 2]]),
            },
            "do not go on from a cache",
        ),
        (
            lambda m: {
                "past_key_values": m(prompt(3, rows=1), use_cache=True).past_key_values,
                "attention_mask": torch.ones(1, 5, dtype=torch.long),
            },
            "5 columns for 3 tokens in the cache and 5 new ones",
        ),
        (
            lambda _: {"attention_mask": torch.tensor([[1, 1, 0, 0, 1]])},
            "padding between the tokens of a row",
        ),
        (lambda m: {"past_key_values": away(m.config)}, "a cache that is not offloaded"),
    ],
)
def test_what_it_cannot_do_is_refused(linear, given, message):
    model = linear("llama", "lolcats")
    with pytest.raises(ValueError, match=message):
        model(prompt(5, rows=1), **given(model))


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize("method", ["lolcats", "gated-delta"])
def test_compiled_it_is_the_same_with_padding_and_a_cache(linear, method):
    model = linear("llama", method)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    mask = torch.ones_like(prompt())
    mask[0, :5] = 0
    with torch.no_grad():
        for given in ({}, {"attention_mask": mask}):
            assert close(compiled(prompt(), **given).logits, model(prompt(), **given).logits)


def away(config):
    cache = transformers.DynamicCache(config=config)
    cache.offloading = True
    return cache


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_hidden_states_and_attentions_are_the_stock_ones(written, structure, family):
    model = load(written(family, "swa-sink", window=TOKENS, sinks=0))
    stock, _ = load_stock(family, structure(family))
    ids = prompt(min(TOKENS, getattr(stock.config, "sliding_window", None) or TOKENS))
    found, wanted = [], []
    for each, into in ((model, found), (stock, wanted)):
        each.set_attn_implementation("eager")
        with torch.no_grad():
            output = each(ids, output_hidden_states=True, output_attentions=True)
        into.extend((output.hidden_states, output.attentions))
    assert len(found[0]) == len(wanted[0])
    assert all(close(*pair) for pair in zip(found[0], wanted[0], strict=True))
    assert len(found[1]) == 1  # of the one layer that attends
    assert close(found[1][0], wanted[1][1])


def test_the_class_of_the_package_is_itself_after_pickling_in_a_fresh_process(written, tmp_path):
    from surgery.models.modeling_linearized import LinearizedForCausalLM

    model = LinearizedForCausalLM.from_pretrained(written("llama", "lolcats"), dtype=torch.float32)
    save_file({"ids": prompt(), "logits": logits(model, prompt())}, tmp_path / "told.safetensors")
    torch.save(model, tmp_path / "model")
    script = (
        "import sys, torch\n"
        "from safetensors.torch import load_file\n"
        "told = load_file(sys.argv[1] + '/told.safetensors')\n"
        "model = torch.load(sys.argv[1] + '/model', weights_only=False)\n"
        "with torch.no_grad(): found = model(told['ids'], use_cache=False).logits\n"
        "assert torch.equal(found, told['logits'])\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=120)


def test_a_cache_is_not_cropped(linear):
    model = linear("llama", "lolcats")
    cache = model(prompt(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.layers[0].crop(-1)
