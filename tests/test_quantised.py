"""Quantised checkpoints read as floats, against float64 and against transformers' own loading."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from quantising import (
    checkpoint_of,
    fp4_of,
    pack_bits,
    pack_nibbles,
    read_all,
    spread,
    writing_plan,
)
from surgery.checkpoint import View, open_checkpoint, stored_tensors
from surgery.errors import CheckpointError
from surgery.quantised import dequantised
from surgery.quantised.error import rounding_error
from surgery.run import run

NAME = "model.layers.0.self_attn.q_proj.weight"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def _fp8(shape, dtype=E4M3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng).mul(40).to(dtype)


def _scales(shape, dtype=torch.float32, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=rng).add(0.5).mul(1e-3).to(dtype)


FP8_CASES = {
    "blocks": ((300, 260), (3, 3), [128, 128], "weight_scale_inv", E4M3),
    "blocks that fit": ((256, 128), (2, 1), [128, 128], "weight_scale_inv", E4M3),
    "small blocks": ((40, 24), (5, 3), [8, 8], "weight_scale_inv", E4M3),
    "no block told": ((40, 24), (5, 3), None, "weight_scale_inv", E4M3),
    "one scale": ((40, 24), (1,), None, "weight_scale_inv", E4M3),
    "one scale without axes": ((40, 24), (), None, "weight_scale_inv", E4M3),
    "a scale per row": ((40, 24), (40, 1), None, "weight_scale", E4M3),
    "a vector per row": ((40, 24), (40,), None, "weight_scale", E4M3),
    "a scale per column": ((40, 24), (1, 24), None, "weight_scale", E4M3),
    "wide range": ((40, 24), (5, 3), [8, 8], "weight_scale_inv", E5M2),
    "other name": ((40, 24), (5, 3), [8, 8], "scale", E4M3),
    "Mistral's name": ((40, 24), (1,), None, "qscale_weight", E4M3),
}


@pytest.mark.parametrize("case", FP8_CASES)
@pytest.mark.parametrize("step", [None, 1, 7])
def test_fp8_is_the_float32_product_for_any_run_of_rows(tmp_path, case, step):
    shape, grid, block, ending, dtype = FP8_CASES[case]
    weight, scale = _fp8(shape, dtype), _scales(grid)
    told = {"quant_method": "fp8"} | ({"weight_block_size": block} if block else {})
    tensors = {NAME: weight, NAME.removesuffix("weight") + ending: scale}
    found = dequantised(open_checkpoint(checkpoint_of(tmp_path / "m", tensors, told)))
    numbers = scale.double().numpy().reshape(scale.shape if scale.ndim > 1 else (-1, 1))
    expected = weight.double().numpy() * spread(numbers, shape, block or (0, 0))
    got = read_all(found, step=step)[NAME]
    assert list(found.tensors) == [NAME]
    assert np.array_equal(got.numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("code", ["bytes", "bfloat16"])
def test_scales_come_in_other_dtypes(tmp_path, code):
    exponents = torch.arange(120, 135, dtype=torch.uint8).reshape(5, 3)
    scale = {"bytes": exponents, "bfloat16": _scales((5, 3), torch.bfloat16)}[code]
    weight = _fp8((40, 24))
    told = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    path = checkpoint_of(tmp_path / "m", {NAME: weight, f"{NAME}_scale_inv": scale}, told)
    numbers = 2.0 ** (exponents.double().numpy() - 127)
    numbers = scale.double().numpy() if code == "bfloat16" else numbers
    expected = weight.double().numpy() * spread(numbers, (40, 24), (8, 8))
    got = read_all(dequantised(open_checkpoint(path)), step=3)[NAME]
    assert np.array_equal(got.numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("grid", [(3, 2, 2), (3, 1, 1), (1, 2, 2), (3,)])
def test_fused_experts_have_scales_of_their_own(tmp_path, grid):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    weight, scale = _fp8((3, 16, 8)), _scales(grid)
    told = {"quant_method": "fp8", "weight_block_size": [8, 4]}
    path = checkpoint_of(tmp_path / "m", {name: weight, f"{name}_scale_inv": scale}, told)
    numbers = scale.double().reshape(-1, 1, 1) if len(grid) == 1 else scale.double()
    full = [spread(one.numpy(), (16, 8), (0, 0)) for one in numbers.expand(3, -1, -1)]
    expected = weight.double().numpy() * np.stack(full)
    for step in (None, 5):
        got = read_all(dequantised(open_checkpoint(path)), step=step)[name]
        assert np.array_equal(got.numpy(), expected.astype(np.float32))


def test_fp8_method_reads_packed_fp4_with_its_own_blocks(tmp_path):
    nibbles = np.random.default_rng(0).integers(0, 16, (6, 64))
    exponents = torch.randint(110, 130, (6, 2), dtype=torch.uint8)
    stored = pack_nibbles(nibbles).view(torch.int8)
    told = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    tensors = {NAME: stored, NAME.removesuffix("weight") + "scale": exponents}
    found = dequantised(open_checkpoint(checkpoint_of(tmp_path / "m", tensors, told)))
    expected = fp4_of(nibbles) * np.repeat(2.0 ** (exponents.double().numpy() - 127), 32, axis=1)
    assert found.tensors[NAME].shape == (6, 64)
    assert np.array_equal(read_all(found, step=4)[NAME].numpy(), expected.astype(np.float32))


def test_fbgemm_experts_have_a_scale_per_output(tmp_path):
    name = "model.layers.0.feed_forward.experts.down_proj"
    weight, scale = _fp8((3, 16, 8)), _scales((3, 8, 1))
    tensors = {name: weight, f"{name}_scale": scale}
    path = checkpoint_of(tmp_path / "m", tensors, {"quant_method": "fbgemm_fp8"})
    expected = weight.double() * scale.double().transpose(1, 2)
    got = read_all(dequantised(open_checkpoint(path)), step=5)[name]
    assert torch.equal(got, expected.float())


def test_the_loss_of_rounding_is_measured(tmp_path):
    told = {"quant_method": "fp8"}
    tensors = {NAME: _fp8((512, 64)), f"{NAME}_scale_inv": _scales((512, 1))}
    found = dequantised(open_checkpoint(checkpoint_of(tmp_path / "m", tensors, told)))
    exact = read_all(found)[NAME].double()
    expected = (exact.bfloat16().double() - exact).norm() / exact.norm()
    assert rounding_error(found, NAME) == pytest.approx(float(expected), rel=1e-6)
    assert 0 < rounding_error(found, NAME) < 2**-9


def _compressed(**weights):
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["lm_head"]}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [64, 40, 37])
@pytest.mark.parametrize("zeros", [False, True])
def test_packed_integers(tmp_path, bits, columns, zeros):
    rng = np.random.default_rng(bits)
    rows, group, half = 21, 16, 1 << (bits - 1)
    groups = -(-columns // group)
    codes, points = rng.integers(0, 2 * half, (rows, columns)), None
    scale = _scales((rows, groups), torch.bfloat16)
    tensors = {
        f"{NAME}_packed": pack_bits(codes, bits),
        f"{NAME}_scale": scale,
        f"{NAME}_shape": torch.tensor([rows, columns]),
    }
    if zeros:
        points = rng.integers(0, 2 * half, (rows, groups))
        tensors[f"{NAME}_zero_point"] = pack_bits(points.T, bits).T
    told = _compressed(num_bits=bits, type="int", group_size=group, strategy="group")
    found = dequantised(open_checkpoint(checkpoint_of(tmp_path / "m", tensors, told)))
    shift = half if points is None else spread(points, (rows, columns), (1, group))
    expected = (codes - shift) * spread(scale.double().numpy(), (rows, columns), (1, group))
    for step in (None, 1, 5):
        got = read_all(found, step=step)[NAME]
        assert np.array_equal(got.numpy(), expected.astype(np.float32))


def test_packed_columns_in_the_order_of_activations(tmp_path):
    rng = np.random.default_rng(3)
    codes, order = rng.integers(0, 16, (6, 32)), rng.permutation(np.arange(32) // 8)
    scale = _scales((6, 4))
    tensors = {
        f"{NAME}_packed": pack_bits(codes, 4),
        f"{NAME}_scale": scale,
        f"{NAME}_g_idx": torch.from_numpy(order.astype(np.int32)),
    }
    told = _compressed(num_bits=4, type="int", group_size=8, strategy="group", actorder="group")
    found = dequantised(open_checkpoint(checkpoint_of(tmp_path / "m", tensors, told)))
    expected = (codes - 8) * scale.double().numpy()[:, order]
    assert np.array_equal(read_all(found)[NAME].numpy(), expected.astype(np.float32))


def test_plain_int8_with_zero_points(tmp_path):
    rng = np.random.default_rng(4)
    codes = rng.integers(-128, 128, (6, 32)).astype(np.int8)
    points = rng.integers(-128, 128, (6, 1)).astype(np.int8)
    scale = _scales((6, 1), torch.bfloat16)
    tensors = {
        NAME: torch.from_numpy(codes),
        f"{NAME}_scale": scale,
        f"{NAME}_zero_point": torch.from_numpy(points),
        NAME.removesuffix("weight") + "input_scale": torch.ones(1),
    }
    told = _compressed(num_bits=8, type="int", strategy="channel")
    found = dequantised(open_checkpoint(checkpoint_of(tmp_path / "m", tensors, told)))
    expected = (codes.astype(float) - points) * scale.double().numpy()
    assert list(found.tensors) == [NAME]
    assert np.array_equal(read_all(found)[NAME].numpy(), expected.astype(np.float32))
    assert any("activations" in note for note in found.notes)


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_packed_fp4(tmp_path, kind):
    nibbles = np.random.default_rng(5).integers(0, 16, (6, 64))
    tensors = {f"{NAME}_packed": pack_nibbles(nibbles)}
    if kind == "nvfp4":
        scale, size = _scales((6, 4)).mul(1e5).to(E4M3), 16
        tensors |= {f"{NAME}_scale": scale, f"{NAME}_global_scale": torch.tensor([37.5])}
        numbers = (scale.float().numpy() / np.float32(37.5)).astype(np.float64)
    else:
        scale, size = torch.randint(110, 130, (6, 2), dtype=torch.uint8), 32
        tensors |= {f"{NAME}_scale": scale}
        numbers = 2.0 ** (scale.double().numpy() - 127)
    told = _compressed(num_bits=4, type="float", group_size=size)
    found = dequantised(open_checkpoint(checkpoint_of(tmp_path / "m", tensors, told)))
    expected = fp4_of(nibbles) * np.repeat(numbers, size, axis=1)
    assert np.array_equal(read_all(found, step=4)[NAME].numpy(), expected.astype(np.float32))


def _oss(folder, structure):
    """Turn the experts of a GPT-OSS checkpoint into MXFP4 blocks."""
    source = structure("gpt_oss")
    config = transformers.AutoConfig.from_pretrained(source).to_dict()
    tensors = load_file(source / "model.safetensors")
    rng = np.random.default_rng(6)
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        groups = -(-inputs // 32)
        nibbles = rng.integers(0, 16, (experts, outputs, groups, 32))
        tensors[f"{name}_blocks"] = pack_nibbles(nibbles)
        scales = rng.integers(118, 124, (experts, outputs, groups))
        tensors[f"{name}_scales"] = torch.from_numpy(scales.astype(np.uint8))
    return checkpoint_of(folder, tensors, {"quant_method": "mxfp4"}, **config)


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path, structure):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    path = _oss(tmp_path / "m", structure)
    stored = load_file(path / "model.safetensors")
    found = dequantised(open_checkpoint(path))
    for step in (None, 7, 50):
        got = read_all(found, step=step)
        for name in [n.removesuffix("_blocks") for n in stored if n.endswith("_blocks")]:
            theirs = convert_moe_packed_tensors(
                stored[f"{name}_blocks"], stored[f"{name}_scales"], dtype=torch.float32
            )
            assert torch.equal(got[name], theirs)
            assert torch.equal(got[name].bfloat16().float(), theirs)  # exact in bfloat16


def test_a_dequantised_checkpoint_is_written_and_loads(tmp_path):
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        scale = tensors[name].float().abs().amax() / 448 * torch.rand(2, 2).add(1)
        tensors[f"{name}_scale_inv"] = scale
        rows, columns = tensors[name].shape
        full = spread(scale.numpy(), (rows, columns), (rows // 2, columns // 2))
        tensors[name] = (tensors[name].float() / torch.from_numpy(full)).to(E4M3)
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    config.dtype = "bfloat16"
    config.quantization_config = {
        "quant_method": "fp8",
        "weight_block_size": [16, 16],
        "activation_scheme": "dynamic",
    }
    config.save_pretrained(tmp_path / "m")
    found = dequantised(open_checkpoint(tmp_path / "m"))
    run(writing_plan(found), tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m",
        quantization_config=transformers.FineGrainedFP8Config(dequantize=True),
        dtype=torch.bfloat16,
    )
    ours, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = theirs.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())


def test_what_is_stored_stays_accounted_for(tmp_path):
    told = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    tensors = {NAME: _fp8((16, 16)), f"{NAME}_scale_inv": _scales((2, 2)), "x": torch.ones(2)}
    source = open_checkpoint(checkpoint_of(tmp_path / "m", tensors, told))
    found = dequantised(source)
    stored = {part.name for tensor in found.tensors.values() for part in stored_tensors(tensor)}
    assert stored == set(source.tensors)
    assert isinstance(found.tensors[NAME], View)
    assert found.tensors[NAME].dtype == "BF16"
    assert "quantization_config" not in found.config
    assert "fp8" in found.notes[-1]


def test_the_config_of_a_nested_text_model_is_found_and_cleared(tmp_path):
    told = {"quant_method": "fp8"}
    tensors = {NAME: _fp8((16, 16)), f"{NAME}_scale_inv": _scales(())}
    text = {"quantization_config": told, "dtype": "float16", "hidden_size": 16}
    path = checkpoint_of(tmp_path / "m", tensors, None, text_config=text)
    found = dequantised(open_checkpoint(path))
    assert found.config["text_config"] == {"dtype": "float16", "hidden_size": 16}
    assert found.tensors[NAME].dtype == "F16"


def test_a_checkpoint_that_is_not_quantised_comes_back_as_it_is(tmp_path):
    source = open_checkpoint(checkpoint_of(tmp_path / "m", {NAME: torch.ones(2, 2)}))
    assert dequantised(source) is source


PLAIN = {NAME: torch.ones(2, 2)}
SCALED = {NAME: _fp8((16, 16)), f"{NAME}_scale_inv": _scales((3, 2))}
REFUSED = {
    "gptq": (PLAIN, {"quant_method": "gptq"}, "gptq"),
    "awq": (PLAIN, {"quant_method": "awq"}, "order of its own kernels"),
    "bitsandbytes": (PLAIN, {"load_in_4bit": True}, "bitsandbytes"),
    "hqq": (PLAIN, {"quant_method": "hqq"}, "not read"),
    "another format": (PLAIN, _compressed() | {"format": "marlin-24"}, "marlin-24"),
    "no scale": ({NAME: _fp8((4, 4))}, {"quant_method": "fp8"}, "scale is missing"),
    "a scale that does not fit": (SCALED, {"quant_method": "fp8"}, "does not cover"),
    "fp8 undeclared": ({NAME: _fp8((4, 4))}, None, "no quantization_config"),
    "gptq undeclared": ({"a.qweight": torch.ones(2, 2)}, None, "no quantization_config"),
    "three bits": (
        {f"{NAME}_packed": torch.ones(2, 3, dtype=torch.int32), f"{NAME}_scale": torch.ones(2, 1)},
        _compressed(num_bits=3, type="int"),
        "packed in a way",
    ),
    "plain and packed": (
        {
            NAME: torch.ones(2, 8),
            f"{NAME}_packed": torch.ones(2, 1, dtype=torch.int32),
            f"{NAME}_scale": torch.ones(2, 1),
        },
        _compressed(num_bits=4, type="int"),
        "both quantised and plain",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_in_one_sentence(tmp_path, case):
    tensors, told, words = REFUSED[case]
    source = open_checkpoint(checkpoint_of(tmp_path / "m", tensors, told))
    with pytest.raises(CheckpointError, match=words):
        dequantised(source)
