"""A loaded recursive model generates, trains, takes adapters and stops after some loops."""

from __future__ import annotations

import copy
import pickle  # noqa: TID251 - how worker processes are handed a configuration

import pytest
import torch
from recursion import FAMILIES, MAP, RELAXED, open_tied, prompt, tied_parameters, write

CASES = [(family, kind) for family in FAMILIES for kind in ("plain", "relaxed")]
SHORT, LONG = 3, 12  # the windows of the families that have one hold eight tokens


def checkpoint(model):
    """By the name that this version of transformers has for it."""
    old = model.gradient_checkpointing_enable
    getattr(model, "activation_checkpointing_enable", old)()


def greedy(model, ids, **kwargs):
    return model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None, **kwargs)


@pytest.mark.parametrize("tokens", [SHORT, LONG])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_decoding_with_a_cache_is_decoding_without(tied, recursive, family, kind, tokens):
    ids, model = prompt(family, tokens), recursive(family, kind)
    cached = greedy(model, ids)
    assert torch.equal(cached, greedy(model, ids, use_cache=False))
    assert torch.equal(cached, greedy(tied(family, kind).unrolled, ids))


@pytest.mark.parametrize("loops", [1, 2])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_decoding_some_loops_with_a_cache_is_decoding_without(recursive, family, kind, loops):
    for tokens in (SHORT, LONG):
        ids, model = prompt(family, tokens), recursive(family, kind)
        cached = greedy(model, ids, num_loops=loops)
        assert torch.equal(cached, greedy(model, ids, num_loops=loops, use_cache=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_loop_is_the_stock_model_cut_after_it(tied, recursive, family):
    ids, cut = prompt(family), copy.deepcopy(tied(family).unrolled)
    cut.config.num_hidden_layers = 2
    with torch.no_grad():
        assert torch.equal(recursive(family)(ids, num_loops=1).logits, cut(ids).logits)


def test_all_loops_are_what_no_number_means(recursive):
    ids, model = prompt("qwen3"), recursive("qwen3")
    with torch.no_grad():
        assert torch.equal(model(ids, num_loops=2).logits, model(ids).logits)


def test_a_number_of_loops_may_be_given_when_loading_and_is_saved(tied, recursive, tmp_path):
    ids = prompt("olmo2")
    open_tied(tied("olmo2").path, num_loops=1).save_pretrained(tmp_path)
    with torch.no_grad():
        expected = recursive("olmo2")(ids, num_loops=1).logits
        assert torch.equal(open_tied(tmp_path)(ids).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_loop_states_are_the_hidden_states_after_the_last_layer_of_each(recursive, family):
    model, ids = recursive(family), prompt(family)
    with torch.no_grad():
        found = model(ids, output_loop_states=True, output_hidden_states=True)
        head = model.lm_head(model.model.norm(found.loop_states[0]))
        expected = model(ids, num_loops=1).logits
    assert [tuple(state.shape) for state in found.loop_states] == [(2, 12, 32)] * 2
    assert torch.equal(found.loop_states[0], found.hidden_states[2])
    if family != "gemma3_text" or model.config.final_logit_softcapping is None:
        assert torch.equal(head, expected)


def test_loop_states_come_last_in_a_tuple(recursive):
    model, ids = recursive("llama"), prompt("llama")
    with torch.no_grad():
        output = model(ids, output_loop_states=True, return_dict=False, num_loops=1)
    assert isinstance(output, tuple)
    assert len(output[-1]) == 1


def test_losses_of_early_loops_reach_the_parameters(tied):
    model = open_tied(tied("llama").path).train()
    checkpoint(model)
    ids = prompt("llama")
    states = model(ids, output_loop_states=True, use_cache=False).loop_states
    states[0].square().mean().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    assert model.model.layers[2].input_layernorm.weight.grad is None


@pytest.mark.parametrize("layer_map", [(0, 1, 1, 2), (0, 0, 1, 1), (0, 1, 1, 0)])
def test_other_schemes_run_each_repeated_block_once_in_one_loop(tmp_path, layer_map):
    recursion = write("llama", tmp_path, layer_map=layer_map)
    model, ids, cut = open_tied(recursion.path), prompt("llama"), recursion.unrolled
    with torch.no_grad():
        assert torch.equal(model(ids).logits, cut(ids).logits)
        kept = [layer_map.index(block) for block in sorted(set(layer_map))]
        cut.model.layers = torch.nn.ModuleList(cut.model.layers[depth] for depth in kept)
        cut.config.num_hidden_layers = len(kept)
        expected = cut(ids, use_cache=False).logits
        assert torch.equal(model(ids, num_loops=1).logits, expected)
    assert torch.equal(
        greedy(model, ids, num_loops=1), greedy(model, ids, num_loops=1, use_cache=False)
    )


def test_overlapping_loops_have_no_states(tmp_path):
    model = open_tied(write("llama", tmp_path, layer_map=(0, 0, 1, 1)).path)
    with pytest.raises(ValueError, match="loops of this layer_map overlap"):
        model(prompt("llama"), output_loop_states=True)


def test_a_loop_that_leaves_out_the_first_layer_of_a_mask_is_refused(tmp_path):
    model = open_tied(write("gemma3_text", tmp_path, layer_map=(0, 0, 1, 2)).path)
    with pytest.raises(ValueError, match="first layer of a kind of mask"):
        model(prompt("gemma3_text"), num_loops=1)


@pytest.mark.parametrize("loops", [0, 3, -1, True])
def test_loops_that_are_not_there_are_refused(recursive, loops):
    with pytest.raises(ValueError, match=r"num_loops: .* is outside 1\.\.2"):
        recursive("llama")(prompt("llama"), num_loops=loops)


def test_a_cache_of_fewer_loops_is_not_continued_with_more(recursive):
    model, ids = recursive("mistral"), prompt("mistral")
    with torch.no_grad():
        cache = model(ids, num_loops=1).past_key_values
        model(ids[:, :1], num_loops=1, past_key_values=cache)
        with pytest.raises(ValueError, match="filled with fewer loops"):
            model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_step_trains_shared_parameters_by_the_sum_over_depths(tied, family, kind, checkpointing):
    recursion, ids = tied(family, kind), prompt(family)
    model = open_tied(recursion.path).train()
    if checkpointing:
        checkpoint(model)
    model(ids, labels=ids, use_cache=False).loss.backward()
    unrolled = recursion.unrolled
    unrolled.zero_grad()
    unrolled(ids, labels=ids, use_cache=False).loss.backward()
    for depth in (0, 1):
        summed = sum(unrolled.model.layers[d].mlp.up_proj.weight.grad for d in (depth, depth + 2))
        found = model.model.layers[depth].mlp.up_proj.weight.grad
        assert torch.allclose(found, summed, rtol=1e-4, atol=1e-6)
    before = tied_parameters(model)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert tied_parameters(model) == before
    up = [layer.mlp.up_proj.weight for layer in model.model.layers]
    assert up[0] is up[2]
    assert not torch.equal(up[0], unrolled.model.layers[0].mlp.up_proj.weight)


def test_a_trained_model_is_saved_and_loaded_as_trained(tied, tmp_path):
    model, ids = open_tied(tied("qwen2", "relaxed").path).train(), prompt("qwen2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(open_tied(tmp_path)(ids).logits, model.eval()(ids).logits)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks by it
def test_adapters_on_all_linears_leave_low_rank_factors_alone(tied):
    import peft

    config = peft.LoraConfig(r=2, target_modules="all-linear")
    model = peft.get_peft_model(open_tied(tied("llama", "relaxed").path), config)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 4 * 7 * 2
    assert all(name.endswith(".default.weight") for name in trained)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks by it
@pytest.mark.parametrize("kind", ["plain", "relaxed"])
def test_adapters_wrap_train_and_load_again(tied, tmp_path, kind):
    import peft

    ids = prompt("llama")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="gaussian")
    model = peft.get_peft_model(open_tied(tied("llama", kind).path), config).train()
    checkpoint(model)
    base = model.get_base_model()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"base_model.model.model.layers.{d}.self_attn.q_proj.lora_{f}.default.weight"
        for d in range(len(MAP)) for f in "AB"
    }  # fmt: skip
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    layers = base.model.layers
    q = [layer.self_attn.q_proj.base_layer.weight for layer in layers]
    assert q[0] is q[2]
    assert all(layer.self_attn.q_proj.lora_B.default.weight.abs().max() > 0 for layer in layers)
    model.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(open_tied(tied("llama", kind).path), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_new_model_starts_without_low_rank_terms(recursive):
    kind = type(recursive("llama", "relaxed"))
    torch.manual_seed(0)
    model = kind(copy.deepcopy(recursive("llama", "relaxed").config))
    for name, ranks in RELAXED.items():
        for layer, rank in zip(model.model.layers, ranks, strict=True):
            linear = layer.get_submodule(name)
            assert hasattr(linear, "lora_A") == bool(rank)
            if rank:
                assert not linear.lora_B.weight.any()
                assert linear.lora_A.weight.std() > 0
    assert model.model.layers[0].mlp.up_proj.weight is model.model.layers[2].mlp.up_proj.weight


def test_missing_low_rank_factors_start_at_no_term(tied, tmp_path):
    from safetensors.torch import save_file

    recursion = tied("llama", "relaxed")
    (tmp_path / "less").mkdir()
    for name in ("config.json", "modeling_recursive.py"):
        (tmp_path / "less" / name).write_bytes((recursion.path / name).read_bytes())
    lost = "model.layers.2.self_attn.q_proj.lora_B.weight"
    kept = {name: t for name, t in recursion.stored.items() if name != lost}
    save_file(kept, tmp_path / "less" / "model.safetensors", metadata={"format": "pt"})
    model, info = open_tied(tmp_path / "less", output_loading_info=True)
    assert info["missing_keys"] == {lost}
    assert not model.get_parameter(lost).any()
    name = "model.layers.1.self_attn.q_proj.lora_B.weight"
    assert torch.equal(model.get_parameter(name), recursion.stored[name])


def test_a_vocabulary_may_grow(tied, tmp_path):
    model, ids = open_tied(tied("gemma3_text").path), prompt("gemma3_text")
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(300)
        model.save_pretrained(tmp_path)
        again = open_tied(tmp_path)
        assert torch.equal(again(ids).logits[..., :264], before)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_initialising_again_leaves_trained_factors(recursive):
    model = type(recursive("llama", "relaxed"))(copy.deepcopy(recursive("llama", "relaxed").config))
    factor = model.model.layers[1].self_attn.q_proj.lora_B.weight
    torch.nn.init.ones_(factor)
    model.init_weights()
    assert factor.min() == 1


def test_quantising_is_refused(recursive):
    config = copy.deepcopy(recursive("llama").config)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(ValueError, match="materialize first"):
        type(recursive("llama"))(config)


def test_a_copy_and_a_pickle_of_a_config_are_the_config(recursive):
    config = recursive("mistral").config
    assert copy.deepcopy(config).to_dict() == config.to_dict()
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()


def test_a_copy_of_a_model_is_tied_and_equal(recursive):
    model, ids = recursive("qwen3", "relaxed"), prompt("qwen3")
    twin = copy.deepcopy(model)
    up = [layer.mlp.up_proj.weight for layer in twin.model.layers]
    assert up[0] is up[2]
    assert up[0] is not model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, model(ids).logits)
