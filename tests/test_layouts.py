"""One mixture of experts in both layouts, as transformers writes them."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from architectures import ARCHITECTURES
from quantising import checkpoint_of, read_all, writing_plan
from surgery.checkpoint import open_checkpoint, stored_tensors
from surgery.errors import CheckpointError
from surgery.layouts import in_layout
from surgery.run import run

SHARED = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# Further architectures, per-expert on disk by default.
MORE = {
    "olmoe": SHARED | ROUTED,
    "qwen2_moe": SHARED | ROUTED | {"shared_expert_intermediate_size": 24},
    "glm4_moe": SHARED
    | {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "granitemoe": SHARED | {"num_local_experts": 4, "num_experts_per_tok": 2},
}
FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "qwen3_next", *MORE)


def _both(name, folder):
    """The same random model, saved as its family does and as transformers holds it in memory."""
    config = ARCHITECTURES[name].config if name in ARCHITECTURES else MORE[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(name, **config), dtype=torch.float32
    )
    model.save_pretrained(folder / "single")
    model.save_pretrained(folder / "fused", save_original_format=False)
    return open_checkpoint(folder / "single"), open_checkpoint(folder / "fused"), model.eval()


def _stored(checkpoint):
    return {n: t for file in checkpoint.files for n, t in load_file(file).items()}


def _assert_same(made, expected, *, step):
    got = read_all(made, step=step)
    assert set(got) == set(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert all(made.tensors[name].shape == expected[name].shape for name in expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layout_reads_as_the_other(tmp_path, family):
    single, fused, _ = _both(family, tmp_path)
    assert set(single.tensors) != set(fused.tensors)
    for step in (None, 5):
        _assert_same(in_layout(single, like=fused), _stored(fused), step=step)
        _assert_same(in_layout(fused, like=single), _stored(single), step=step)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_what_is_written_in_the_other_layout_has_the_same_logits(tmp_path, family):
    single, fused, model = _both(family, tmp_path)
    inputs = {"input_ids": torch.arange(12)[None] % 64}
    with torch.no_grad():
        expected = model(**inputs).logits
    for number, (source, other) in enumerate([(single, fused), (fused, single)]):
        run(writing_plan(in_layout(source, like=other)), tmp_path / f"out{number}")
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / f"out{number}", dtype=torch.float32, output_loading_info=True
        )
        with torch.no_grad():
            assert torch.equal(loaded.eval()(**inputs).logits, expected)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]


def test_parts_of_fused_experts_are_read_once_each(tmp_path):
    single, fused, _ = _both("qwen3_moe", tmp_path)
    made = in_layout(fused, like=single)
    parts = [part for tensor in made.tensors.values() for part in stored_tensors(tensor)]
    assert sum(part.nbytes for part in parts) == fused.nbytes
    assert len({part.name for part in parts}) == len(parts)


def _rows(tensor, *, interleaved, inputs_first):
    """Lay out [experts, gate above up, inputs] another way."""
    if interleaved:
        tensor = torch.stack(tensor.chunk(2, dim=1), dim=2).flatten(1, 2)
    return tensor.transpose(1, 2) if inputs_first else tensor


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("target", ["single", "fused", "inputs first", "interleaved"])
def test_experts_with_the_inputs_first(tmp_path, interleaved, target):
    experts, hidden, inner = 3, 8, 5
    torch.manual_seed(1)
    both = torch.randn(experts, 2 * inner, hidden)
    down = torch.randn(experts, hidden, inner)
    prefix = "model.layers.0.mlp"
    layouts = {"fused": (False, False), "inputs first": (False, True), "interleaved": (True, True)}

    def fused(mixed, first):
        return {
            f"{prefix}.experts.gate_up_proj": _rows(both, interleaved=mixed, inputs_first=first),
            f"{prefix}.experts.down_proj": down.transpose(1, 2) if first else down,
        }

    kind = "gpt_oss" if interleaved else "llama4_text"
    source = checkpoint_of(tmp_path / "a", fused(interleaved, True), model_type=kind)
    if target == "single":
        expected = {}
        for n in range(experts):
            gate, up = both[n].chunk(2)
            parts = {"gate_proj": gate, "up_proj": up, "down_proj": down[n]}
            expected |= {f"{prefix}.experts.{n}.{p}.weight": t for p, t in parts.items()}
        kind = "qwen3_moe"
    else:
        expected = fused(*layouts[target])
        kind = {"interleaved": "gpt_oss"}.get(target, "llama4_text")
    like = open_checkpoint(checkpoint_of(tmp_path / "b", expected, model_type=kind))
    made = in_layout(open_checkpoint(source), like=like)
    for step in (None, 3, 7):
        _assert_same(made, expected, step=step)


@pytest.mark.parametrize("target", ["single", "fused"])
def test_biases_go_with_their_experts(tmp_path, target):
    experts, hidden, inner = 3, 4, 6
    prefix, rng = "model.layers.0.mlp.experts", torch.Generator().manual_seed(2)
    gates, ups, downs = (
        torch.randn(experts, size, generator=rng) for size in (inner, inner, hidden)
    )
    weights = {
        f"{prefix}.gate_up_proj": torch.randn(experts, hidden, 2 * inner, generator=rng),
        f"{prefix}.down_proj": torch.randn(experts, inner, hidden, generator=rng),
    }
    mixed = torch.stack([gates, ups], dim=2).flatten(1)
    source = {f"{prefix}.gate_up_proj_bias": mixed, f"{prefix}.down_proj_bias": downs}
    path = checkpoint_of(tmp_path / "a", weights | source, model_type="gpt_oss")
    if target == "single":
        biases = {"gate_proj": gates, "up_proj": ups, "down_proj": downs}
        expected = {
            f"{prefix}.{n}.{p}.bias": t[n] for p, t in biases.items() for n in range(experts)
        }
        for n in range(experts):
            gate_up = weights[f"{prefix}.gate_up_proj"][n].T
            expected[f"{prefix}.{n}.gate_proj.weight"] = gate_up[0::2]
            expected[f"{prefix}.{n}.up_proj.weight"] = gate_up[1::2]
            expected[f"{prefix}.{n}.down_proj.weight"] = weights[f"{prefix}.down_proj"][n].T
    else:
        gate_up = weights[f"{prefix}.gate_up_proj"]
        stacked = torch.cat([gate_up[..., 0::2], gate_up[..., 1::2]], dim=2)
        expected = {
            f"{prefix}.gate_up_proj": stacked.transpose(1, 2),
            f"{prefix}.gate_up_proj_bias": torch.cat([gates, ups], dim=1),
            f"{prefix}.down_proj": weights[f"{prefix}.down_proj"].transpose(1, 2),
            f"{prefix}.down_proj_bias": downs,
        }
    like = open_checkpoint(checkpoint_of(tmp_path / "b", expected, model_type="other"))
    made = in_layout(open_checkpoint(path), like=like)
    for step in (None, 2):
        _assert_same(made, expected, step=step)


@pytest.mark.parametrize("family", ["gpt_oss", "llama"])
def test_what_is_laid_out_alike_comes_back_as_it_is(structure, family):
    source = open_checkpoint(structure(family))
    assert in_layout(source, like=source) is source


def test_qwen3_vl_stores_its_experts_inputs_first_or_outputs_first(tmp_path):
    config = transformers.AutoConfig.for_model(
        "qwen3_vl_moe",
        text_config=SHARED | ROUTED | {"decoder_sparse_step": 1, "head_dim": 8},
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
            "out_hidden_size": 32, "patch_size": 4, "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "new")
    new = open_checkpoint(tmp_path / "new")
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    tensors = _stored(new)
    assert tensors[name].shape == (4, 48, 32)
    turned = {n: t.transpose(1, 2) if ".experts." in n else t for n, t in tensors.items()}
    config.save_pretrained(tmp_path / "old")  # what the published checkpoints have
    save_file(
        {n: t.contiguous() for n, t in turned.items()},
        tmp_path / "old" / "model.safetensors",
        metadata={"format": "pt"},
    )
    old = open_checkpoint(tmp_path / "old")
    loaded = type(model).from_pretrained(tmp_path / "old", dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, loaded[n]) for n, tensor in model.state_dict().items())
    _assert_same(in_layout(old, like=new), tensors, step=7)
    _assert_same(in_layout(new, like=old), turned, step=7)


def test_a_layer_that_the_other_has_not_follows_its_first(tmp_path):
    """Models of unlike depth: layers of both make one model, in one layout."""
    single, fused, _ = _both("mixtral", tmp_path)
    few = {n: t for n, t in _stored(fused).items() if ".layers.2." not in n}
    path = checkpoint_of(tmp_path / "few", few, model_type="mixtral", num_hidden_layers=2)
    _assert_same(in_layout(single, like=open_checkpoint(path)), _stored(fused), step=5)
    few = {n: t for n, t in _stored(single).items() if ".layers.2." not in n}
    path = checkpoint_of(tmp_path / "few2", few, model_type="mixtral", num_hidden_layers=2)
    _assert_same(in_layout(fused, like=open_checkpoint(path)), _stored(single), step=5)


def test_models_of_other_shapes_are_refused(tmp_path):
    def mixture(count):
        parts = {"gate_proj": (5, 4), "up_proj": (5, 4), "down_proj": (4, 5)}
        return {
            f"model.layers.0.mlp.experts.{n}.{p}.weight": torch.ones(shape)
            for n in range(count)
            for p, shape in parts.items()
        }

    few = open_checkpoint(checkpoint_of(tmp_path / "a", mixture(2)))
    many = open_checkpoint(checkpoint_of(tmp_path / "b", mixture(3)))
    fused = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.ones(3, 10, 4),
        "model.layers.0.mlp.experts.down_proj": torch.ones(3, 4, 5),
    }
    other = open_checkpoint(checkpoint_of(tmp_path / "c", fused))
    none = open_checkpoint(checkpoint_of(tmp_path / "n", {"model.layers.0.w": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"has 2 experts, its layer in .* 3 experts"):
        in_layout(few, like=other)
    assert in_layout(few, like=many) is few
    assert in_layout(few, like=none) is few
    lost = {n: t for n, t in mixture(3).items() if ".1.up_proj" not in n}
    with pytest.raises(CheckpointError, match=r"has no model\.layers\.0\.mlp\.experts\.1\.up_proj"):
        in_layout(open_checkpoint(checkpoint_of(tmp_path / "d", lost)), like=few)
