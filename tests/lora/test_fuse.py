"""`BASE+ADAPTER` is what peft makes of the two, to one rounding, whatever the adapter holds."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from surgery.checkpoint import open_checkpoint
from surgery.errors import CheckpointError
from surgery.lora.fuse import fuse

LLAMA = ["q_proj", "v_proj", "down_proj"]
CASES = {
    "plain": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": LLAMA}),
    "one rank": ("llama", {"r": 1, "target_modules": ["o_proj"]}),
    "rank above the tile": ("llama", {"r": 24, "target_modules": LLAMA}),
    "rslora": ("llama", {"r": 4, "use_rslora": True, "target_modules": LLAMA}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "target_modules": LLAMA,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 7},
            "alpha_pattern": {"down_proj": 3, "layers.2.self_attn.v_proj": 1.5},
        },
    ),
    "rslora and patterns": (
        "llama",
        {"r": 4, "use_rslora": True, "target_modules": LLAMA, "rank_pattern": {"down_proj": 9}},
    ),
    "some layers": (
        "llama",
        {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1, 3]},
    ),
    "dora": ("llama", {"r": 4, "use_dora": True, "target_modules": LLAMA}),
    "every linear layer": ("qwen3", {"r": 3, "target_modules": "all-linear"}),
    "biases of the adapted": (
        "llama_bias",
        {"r": 4, "bias": "lora_only", "target_modules": LLAMA},
    ),
    "all biases": ("qwen2", {"r": 4, "bias": "all", "target_modules": ["q_proj", "up_proj"]}),
    "bias of b": ("llama_bias", {"r": 4, "lora_bias": True, "target_modules": LLAMA}),
    "whole modules": (
        "llama",
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    ),
    "head": ("llama", {"r": 4, "target_modules": ["q_proj", "lm_head"]}),
    "embedding": ("llama", {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}),
    "stored in, out": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"]}),
    "fused attention": ("phi3", {"r": 4, "target_modules": ["qkv_proj"]}),
    "tokens": (
        "llama",
        {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [3, 200, 17]},
    ),
    "tokens of a tied embedding": (
        "llama_tied",
        {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5]}},
    ),
    "fused experts, in by out": (
        "gpt_oss",
        {
            "r": 2,
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "fused experts, stored one by one": (
        "qwen3_moe",
        {
            "r": 2,
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "one fused parameter of experts": (
        "mixtral",
        {
            "r": 2,
            "target_modules": ["v_proj"],
            "target_parameters": ["mlp.experts.down_proj"],
        },
    ),
    "text tower under another name": (
        "gemma3",
        {"r": 3, "target_modules": r".*language_model.*q_proj"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_fusing_is_what_peft_merges(case, lab, tmp_path) -> None:
    name, config = CASES[case]
    base = lab.structure(name)
    adapter = lab.train(base, **config)
    expected = lab.merged(base, adapter, tmp_path / "theirs")
    found = lab.tensors(lab.write(fuse(open_checkpoint(f"{base}+{adapter}"))))
    assert found.keys() == expected.keys()
    changed = [n for n, t in lab.tensors(base).items() if not torch.equal(t, found[n])]
    assert changed
    for key, tensor in expected.items():
        assert torch.allclose(found[key], tensor, rtol=2e-6, atol=1e-6), key


TIED = {
    "head and embedding, kept tied": {
        "target_modules": ["q_proj", "embed_tokens", "lm_head"],
        "ensure_weight_tying": True,
    },
    "embedding only": {"target_modules": ["q_proj", "embed_tokens"]},
    "head only": {"target_modules": ["q_proj", "lm_head"]},
    "whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("case", TIED)
def test_a_tied_model_computes_what_peft_runs_unmerged(case, lab) -> None:
    base = lab.structure("llama_tied")
    adapter = lab.train(base, r=4, **TIED[case])
    fused = lab.write(fuse(open_checkpoint(f"{base}+{adapter}")))
    expected = lab.logits(lab.adapted(base, adapter))
    torch.testing.assert_close(lab.logits(lab.load(fused)), expected, rtol=1e-4, atol=1e-5)


def test_two_adapters_add_up_to_one_rounding(lab) -> None:
    base = lab.structure("llama")
    one = lab.train(base, r=4, target_modules=["q_proj", "v_proj"], seed=1)
    two = lab.train(base, r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"], seed=2)
    fused = lab.write(fuse(open_checkpoint(f"{base}+{one}+{two}")))
    expected = lab.logits(lab.adapted(base, one, two))
    torch.testing.assert_close(lab.logits(lab.load(fused)), expected, rtol=1e-4, atol=1e-5)


def test_two_adapters_of_one_shape_are_not_taken_for_each_other(lab) -> None:
    base = lab.structure("llama")
    one, two = (lab.train(base, r=4, target_modules=["q_proj"], seed=s) for s in (1, 2))
    fused = lab.write(fuse(open_checkpoint(f"{base}+{one}+{two}")))
    expected = lab.logits(lab.adapted(base, one, two))
    torch.testing.assert_close(lab.logits(lab.load(fused)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_happens_once(dtype, lab, tmp_path) -> None:
    base = tmp_path / "base"
    lab.load(lab.structure("llama")).to(dtype).save_pretrained(base)
    adapter = lab.train(base, r=4, lora_alpha=6, target_modules=["down_proj"])
    found = lab.tensors(lab.write(fuse(open_checkpoint(f"{base}+{adapter}"))))
    stored, factors = lab.tensors(base), lab.tensors(adapter)
    for layer in range(4):
        name = f"model.layers.{layer}.mlp.down_proj"
        a, b = (factors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
        expected = stored[f"{name}.weight"].double() + 1.5 * b @ a
        ulp = torch.finfo(dtype).eps * expected.abs().clamp(min=torch.finfo(dtype).smallest_normal)
        error = (found[f"{name}.weight"].double() - expected).abs()
        assert (error <= 0.501 * ulp + 1e-9 * (dtype != torch.float32)).all()


def test_bytes_do_not_depend_on_workers_or_shards(lab) -> None:
    base = lab.structure("qwen3")
    adapter = lab.train(base, r=24, target_modules=["q_proj", "down_proj"])
    plan = fuse(open_checkpoint(f"{base}+{adapter}"))
    one = lab.tensors(lab.write(plan, workers=1))
    many = lab.tensors(lab.write(plan, workers=4, shard_size=1 << 16))
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_rows_do_not_depend_on_their_company(lab) -> None:
    from surgery.checkpoint import read_rows
    from surgery.compute import stored_reader
    from surgery.slices import Sources

    base = lab.structure("llama")
    adapter = lab.train(base, r=24, target_modules=["q_proj"], use_dora=True)
    source = open_checkpoint(f"{base}+{adapter}")
    view = source.tensors["model.layers.2.self_attn.q_proj.weight"]
    with Sources((source,)) as sources:
        read = stored_reader(sources)
        whole = read_rows(read, view, 0, 32)
        for start, count in [(0, 1), (15, 2), (3, 20), (31, 1)]:
            assert torch.equal(read_rows(read, view, start, count), whole[start : start + count])


def test_factors_that_are_not_kept_are_read_again(lab, monkeypatch) -> None:
    base = lab.structure("llama")
    adapter = lab.train(base, r=4, target_modules=["q_proj", "up_proj"])
    plan = fuse(open_checkpoint(f"{base}+{adapter}"))
    expected = lab.tensors(lab.write(plan))
    monkeypatch.setattr("surgery.checkpoint.lowrank.KEPT", 0)
    found = lab.tensors(lab.write(fuse(open_checkpoint(f"{base}+{adapter}"))))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_dora_of_weights_stored_in_out_is_refused(lab) -> None:
    base = lab.structure("gpt2")
    adapter = lab.train(base, r=4, target_modules=["c_attn"], use_dora=True)
    with pytest.raises(CheckpointError, match=r"DoRA of .*c_attn', which is stored \[in, out\]"):
        open_checkpoint(f"{base}+{adapter}")


@pytest.mark.parametrize("swap", [False, True])
def test_a_square_of_a_bare_file_is_stored_as_the_adapter_says(swap, lab, tmp_path) -> None:
    base = lab.structure("llama")
    adapter = lab.train(base, r=4, target_modules=["q_proj"])
    shutil.copytree(adapter, tmp_path / "adapter")
    place = tmp_path / "adapter" / "adapter_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"fan_in_fan_out": swap}))
    bare = open_checkpoint(f"{base}/model.safetensors+{tmp_path}/adapter")
    found = load_file(lab.write(fuse(bare), "out.safetensors"))
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = lab.tensors(lab.write(fuse(open_checkpoint(f"{base}+{adapter}"))))[name]
    stored = lab.tensors(base)[name]
    change = (expected - stored).T if swap else expected - stored
    torch.testing.assert_close(found[name], stored + change, rtol=1e-5, atol=1e-6)
