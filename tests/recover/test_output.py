"""What is written is what was trained, by the student's names, and nothing else has changed."""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cli.operations import find_operation
from growth.expand import expand
from growth.factor.plan import factor
from growth.recurse.tying import relax, tie
from growth.sparsify import sparsify
from healing import IDS, heal, load, logits, tensors
from surgery.checkpoint import open_checkpoint
from surgery.errors import PlanError
from surgery.provenance import read_record
from surgery.recover.output import healed, keep_adapter, open_trained
from surgery.reproduce import reproduce
from surgery.run import run

MODES = ("lora", "full", "norms", "half")
FAMILIES = (
    *("llama", "llama_tied", "llama_bias", "qwen3", "gemma2", "gpt2", "gpt_neox", "phi3"),
    *("falcon", "cohere2", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next"),
    *("llava", "qwen2_vl"),
)
MERGED = 1e-4  # the product is rounded in another place than in training
BFLOAT = 2**-8  # half a step of bfloat16, relative
NORM = re.compile(r"norm|ln_|layernorm", re.IGNORECASE)


def close(found: torch.Tensor, wanted: torch.Tensor, mode: str) -> bool:
    return float((found - wanted).abs().max()) <= (MERGED if mode == "lora" else 0.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_is_the_trained_model(family, mode, structure, tmp_path) -> None:
    found = heal(structure(family), tmp_path, train=mode)
    assert torch.equal(found.start, found.before)
    assert float((found.after - found.before).abs().max()) > 1e-3
    assert close(found.written(), found.after, mode)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_norms_alone_change_with_norms(family, structure, tmp_path) -> None:
    changed = heal(structure(family), tmp_path, train="norms").changed()
    assert changed
    assert all(NORM.search(name) or name.endswith("bias") for name in changed)


@pytest.mark.parametrize("init", ["gaussian", "pissa", "olora", "orthogonal", "eva"])
def test_every_start_gives_plain_lora_of_the_untouched_student(init, structure, tmp_path) -> None:
    samples = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
    found = heal(structure("llama"), tmp_path, lora_init=init, samples=samples)
    assert float((found.start - found.before).abs().max()) < 1e-5
    assert close(found.written(), found.after, "lora")
    assert not any("embed" in name or "lm_head" in name for name in found.changed())


def test_corda_starts_from_inputs(structure, tmp_path) -> None:
    pytest.importorskip("attr")  # which peft's corda asks for
    found = heal(structure("llama"), tmp_path, lora_init="corda", samples=[{"input_ids": IDS}])
    assert close(found.written(), found.after, "lora")


def test_alpha_scales_what_is_written(structure, tmp_path) -> None:
    found = heal(structure("llama"), tmp_path, lora_alpha=24.0)
    assert close(found.written(), found.after, "lora")


def test_lora_keeps_to_what_is_included(structure, tmp_path) -> None:
    changed = heal(structure("llama"), tmp_path, include=("self_attn",)).changed()
    assert {name.split(".")[3] for name in changed if not NORM.search(name)} == {"self_attn"}


@pytest.mark.parametrize("mode", MODES)
def test_a_bfloat16_student_is_rounded_once(mode, structure, tmp_path) -> None:
    shutil.copytree(structure("llama"), tmp_path / "half")
    halved = {n: t.bfloat16() for n, t in tensors(tmp_path / "half").items()}
    save_file(halved, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
    found = heal(tmp_path / "half", tmp_path, train=mode)
    trained, written, changed = tensors(found.folder), tensors(found.out), found.changed()
    assert changed
    if mode != "lora":
        assert all(torch.equal(written[n], t.bfloat16()) for n, t in trained.items())
        return
    for name in (name for name in changed if not NORM.search(name)):
        a, b = (
            trained[f"base_model.model.{name.removesuffix('weight')}lora_{x}.weight"] for x in "AB"
        )
        exact = halved[name].double() + b.double() @ a.double()
        assert torch.all((written[name] - exact).abs() <= exact.abs() * BFLOAT + 1e-9), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("mode", MODES)
def test_zeros_of_a_sparse_student_stay(family, mode, structure, tmp_path) -> None:
    sparse = run(
        sparsify(open_checkpoint(structure(family)), method="magnitude", sparsity="0.5"),
        tmp_path / "sparse",
    ).out
    found = heal(sparse, tmp_path, train=mode)
    assert close(found.written(), found.after, mode)
    record = read_record(open_checkpoint(found.out)) or {}
    old, new = tensors(sparse), tensors(found.out)
    assert record["facts"]["masked"]
    for module in record["facts"]["masked"]:
        name = f"{module}.weight"
        assert torch.equal(new[name] == 0, old[name] == 0), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["tied", "norms tied", "experts tied", "relaxed"])
def test_shared_layers_are_written_once(kind, mode, structure, tmp_path) -> None:
    base = open_checkpoint(structure("mixtral" if kind == "experts tied" else "llama"))
    plan = relax(base, blocks=2, rank=4) if kind == "relaxed" else None
    plan = plan or tie(base, blocks=2, tie_norms=kind == "norms tied")
    found = heal(run(plan, tmp_path / "student").out, tmp_path, train=mode)
    assert found.changed()
    assert close(found.written(), found.after, mode)


@pytest.mark.parametrize("mode", MODES)
def test_factored_maps_stay_factored(mode, structure, tmp_path) -> None:
    plan = factor(open_checkpoint(structure("llama")), method="svd", rank=8)
    found = heal(run(plan, tmp_path / "student").out, tmp_path, train=mode)
    assert close(found.written(), found.after, mode)
    if mode != "norms":
        assert any("factor_A" in name for name in found.changed())


def test_new_layers_alone_change(structure, tmp_path) -> None:
    plan = expand(open_checkpoint(structure("llama")), blocks=2)
    layers = plan.facts["trainable_layers"]
    found = heal(run(plan, tmp_path / "student").out, tmp_path, train="new")
    assert found.changed()
    assert {int(name.split(".")[2]) for name in found.changed()} == set(layers)
    assert torch.equal(found.written(), found.after)


@pytest.mark.parametrize("mode", [*MODES, "new"])
def test_a_trained_fixture_is_healed(mode, fixtures_dir, tmp_path) -> None:
    wide = {n: t.float() for n, t in tensors(fixtures_dir / "base").items()}
    shutil.copytree(fixtures_dir / "base", tmp_path / "base")
    save_file(wide, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    plan = expand(open_checkpoint(tmp_path / "base"), blocks=2)
    found = heal(run(plan, tmp_path / "deep").out, tmp_path, train=mode)
    assert close(found.written(), found.after, mode)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_writing_is_reproduced_from_student_and_what_was_trained(
    mode, structure, tmp_path
) -> None:
    found = heal(structure("llama"), tmp_path, train=mode, told={"loss": [2.0, 1.5]})
    again = reproduce(open_checkpoint(found.out), find_operation)
    assert not again.inputs
    assert not again.outputs
    assert again.identical == len(found.student.tensors)


def test_the_record_tells_mode_and_figures(structure, tmp_path) -> None:
    found = heal(structure("llama"), tmp_path, train="norms", told={"data": {"a.txt": "0f"}})
    record = read_record(open_checkpoint(found.out)) or {}
    assert record["operation"] == "recover"
    assert record["facts"] == {"trained": "norms", "data": {"a.txt": "0f"}}


def test_a_kept_adapter_is_one_that_peft_loads(structure, tmp_path) -> None:
    from peft import PeftModel

    found = heal(structure("mixtral"), tmp_path)
    place = keep_adapter(found.folder, found.out)
    assert place == found.out.with_name("healed-adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(load(structure("mixtral"))[0], place)
    assert close(logits(model), found.after, "lora")


def test_nothing_is_kept_where_there_is_no_adapter(structure, tmp_path) -> None:
    found = heal(structure("llama"), tmp_path, train="norms")
    assert keep_adapter(found.folder, found.out) is None


def test_a_kept_adapter_does_not_overwrite(structure, tmp_path) -> None:
    found = heal(structure("llama"), tmp_path)
    (tmp_path / "healed-adapter").mkdir()
    with pytest.raises(PlanError, match="is there, and is no adapter"):
        keep_adapter(found.folder, found.out)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"other.weight": torch.zeros(2)}, "the student does not have it"),
        ({"model.norm.weight": torch.zeros(2)}, r"the student has it of shape \[32\]"),
    ],
)
def test_tensors_of_another_model_are_refused(held, message, structure, tmp_path) -> None:
    save_file(held, tmp_path / "trained.safetensors")
    sources = open_trained(open_checkpoint(structure("llama")), Path(tmp_path))
    with pytest.raises(PlanError, match=message):
        healed(*sources, mode="full")


def test_nothing_trained_is_refused(structure) -> None:
    with pytest.raises(PlanError, match="nothing that was trained"):
        healed(open_checkpoint(structure("llama")), mode="full")
