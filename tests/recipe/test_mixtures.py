"""Models that are stored in unlike ways, merged: experts in two layouts, shuffled, quantised."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from architectures import ARCHITECTURES
from cli.main import main
from surgery.checkpoint import open_checkpoint
from surgery.errors import CheckpointError, RecipeError
from surgery.recipe import compile, merge_models, parse_recipe
from surgery.run import run


def _mixture(folder, *, seed, fused=False, kind="qwen3_moe"):
    config = transformers.AutoConfig.for_model(kind, **ARCHITECTURES[kind].config)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder, save_original_format=not fused)
    return folder


def _tensors(path):
    return {n: t for file in open_checkpoint(path).files for n, t in load_file(file).items()}


@pytest.mark.parametrize("fused", [False, True])
def test_two_layouts_are_merged_in_that_of_the_donor(tmp_path, fused):
    for name, seed, layout in (("a", 0, fused), ("b", 1, not fused), ("same", 1, fused)):
        _mixture(tmp_path / name, seed=seed, fused=layout)
    for name, other in (("mixed", "b"), ("plain", "same")):
        recipe = merge_models("linear", [tmp_path / "a", tmp_path / other], weight=[0.3, 0.7])
        run(compile(recipe), tmp_path / name)
    mixed, plain = _tensors(tmp_path / "mixed"), _tensors(tmp_path / "plain")
    assert set(mixed) == set(plain) == set(_tensors(tmp_path / "a"))
    assert all(torch.equal(mixed[n], plain[n]) for n in plain)


@pytest.mark.parametrize("fused", [False, True])
def test_a_merge_of_two_layouts_is_verified_and_made_again(tmp_path, capsys, fused):
    for name, seed, layout in (("a", 0, fused), ("b", 1, not fused)):
        _mixture(tmp_path / name, seed=seed, fused=layout)
    run(
        compile(merge_models("linear", [tmp_path / "a", tmp_path / "b"], weight=0.5)),
        tmp_path / "out",
    )
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert main(["reproduce", str(tmp_path / "out")]) == 0
    capsys.readouterr()


def test_quantised_experts_are_read_in_the_other_layout(tmp_path):
    """DeepSeek's way of storing, fp8 and one by one, merged into fused bfloat16."""
    plain = _mixture(tmp_path / "a", seed=0)
    donor = _mixture(tmp_path / "fused", seed=1, fused=True)
    tensors = _tensors(plain)
    loose = dict(tensors)
    for name in [n for n in tensors if ".experts." in n]:
        scale = tensors[name].abs().amax() / 448
        codes = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors |= {name: codes, f"{name}_scale_inv": scale.reshape(1, 1)}
        loose[name] = codes.float() * scale
    config = json.loads((plain / "config.json").read_text())
    told = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    for folder, stored, more in (("q", tensors, told), ("p", loose, {})):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(config | more))
        save_file(stored, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
        recipe = merge_models("linear", [donor, tmp_path / folder], weight=[0.25, 0.75])
        run(compile(recipe), tmp_path / f"out-{folder}")
    ours, theirs = _tensors(tmp_path / "out-q"), _tensors(tmp_path / "out-p")
    assert set(ours) == set(_tensors(donor))
    assert all(torch.allclose(ours[n], theirs[n], rtol=0, atol=1e-7) for n in theirs)


@pytest.mark.parametrize("fused", [False, True])
def test_a_method_of_several_passes_reads_both_layouts(tmp_path, fused):
    for name, seed, layout in (("a", 0, fused), ("b", 1, not fused), ("same", 1, fused)):
        _mixture(tmp_path / name, seed=seed, fused=layout)
    for name, other in (("mixed", "b"), ("plain", "same")):
        recipe = merge_models("slerp", [tmp_path / other], base=tmp_path / "a", t=0.4)
        run(compile(recipe), tmp_path / name)
    mixed, plain = _tensors(tmp_path / "mixed"), _tensors(tmp_path / "plain")
    assert all(torch.allclose(mixed[n], plain[n], rtol=0, atol=1e-7) for n in plain)


def _shuffled(source, folder):
    """The same model with the experts of each layer in another order."""
    tensors = dict(_tensors(source))
    order = [3, 1, 0, 2]
    for name in list(tensors):
        head, found, tail = name.partition(".experts.")
        if found:
            expert, _, rest = tail.partition(".")
            tensors[name] = _tensors(source)[f"{head}.experts.{order[int(expert)]}.{rest}"]
        elif name.endswith("mlp.gate.weight"):
            tensors[name] = tensors[name][order]
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    kept = {n: t.contiguous() for n, t in tensors.items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_experts_are_matched_before_merging(tmp_path, capsys):
    source = _mixture(tmp_path / "a", seed=0)
    other = _shuffled(source, tmp_path / "b")
    words = ["merge", "linear", str(source), str(other), "--weight", "0.5", "--match-experts"]
    assert main([*words, "-o", str(tmp_path / "out")]) == 0
    original, merged = _tensors(source), _tensors(tmp_path / "out")
    assert all(torch.equal(merged[n], original[n]) for n in original)
    record = json.loads((tmp_path / "out" / "surgery.json").read_text())
    groups = record["facts"]["experts_matched"]["b"]["groups"]
    assert all(group["moved"] == 3 for group in groups.values())
    assert main(["reproduce", str(tmp_path / "out")]) == 0
    capsys.readouterr()


def test_without_the_ask_experts_stay(tmp_path):
    source = _mixture(tmp_path / "a", seed=0)
    other = _shuffled(source, tmp_path / "b")
    run(compile(merge_models("linear", [source, other], weight=0.5)), tmp_path / "out")
    original, merged = _tensors(source), _tensors(tmp_path / "out")
    assert any(not torch.equal(merged[n], original[n]) for n in original)


def test_a_recipe_may_ask_for_it(tmp_path, structure):
    table = {"merge_method": "linear", "models": [{"model": "x"}], "match_experts": "yes please"}
    with pytest.raises(RecipeError, match="match_experts: is neither true nor false"):
        parse_recipe(table)
    models = [structure("llama"), structure("llama_bias")]
    with pytest.raises(CheckpointError, match="no experts that are known"):
        compile(merge_models("linear", models, weight=1.0, match_experts=True))


def test_a_quantised_model_is_merged_with_a_plain_one(tmp_path, structure):
    source = structure("llama")
    tensors = _tensors(source)
    plain = dict(tensors)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        scale = tensors[name].abs().amax(dim=1, keepdim=True) / 448
        codes = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors |= {name: codes, f"{name}_scale_inv": scale}
        plain[name] = codes.float() * scale
    config = json.loads((source / "config.json").read_text())
    for name, stored, told in (
        ("plain", plain, {}),
        ("fp8", tensors, {"quantization_config": {"quant_method": "fp8"}}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | told))
        save_file(stored, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        recipe = merge_models("linear", [source, tmp_path / name], weight=[0.5, 0.5])
        run(compile(recipe), tmp_path / f"out-{name}")
    ours, theirs = _tensors(tmp_path / "out-fp8"), _tensors(tmp_path / "out-plain")
    assert all(torch.allclose(ours[n], theirs[n], rtol=0, atol=1e-7) for n in theirs)
