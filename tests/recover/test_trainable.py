"""What trains by mode, what stays as it is, and what is refused before the first step."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from growth.recurse.tying import tie
from growth.sparsify import sparsify
from healing import IDS, load, logits, steps, tensors
from surgery.checkpoint import open_checkpoint
from surgery.errors import SurgeryError
from surgery.recover.selected import half
from surgery.recover.settings import Settings
from surgery.recover.trainable import Trainable, make_trainable
from surgery.run import run


def opened(path: Path, **options) -> Trainable:
    settings = Settings(**{"rank": 8, **options})
    return make_trainable(load(path)[0], open_checkpoint(path), settings)


def frozen_bytes(trainable: Trainable) -> dict[str, torch.Tensor]:
    return {
        n: p.detach().clone()
        for n, p in trainable.model.named_parameters()
        if n not in trainable.parameters
    }


@pytest.mark.parametrize("mode", ["lora", "full", "norms", "half"])
def test_only_what_trains_moves(mode, structure) -> None:
    trainable = opened(structure("llama"), train=mode)
    frozen = frozen_bytes(trainable)
    before = {n: p.detach().clone() for n, p in trainable.parameters.items()}
    steps(trainable, Settings(train=mode))
    now = dict(trainable.model.named_parameters())
    assert all(torch.equal(now[name], old) for name, old in frozen.items())
    assert all(not torch.equal(now[name], old) for name, old in before.items())


@pytest.mark.parametrize("mode", ["lora", "full", "norms", "half"])
def test_names_and_starts_are_the_same_in_every_run(mode, structure) -> None:
    one, two = (opened(structure("mixtral"), train=mode).parameters for _ in range(2))
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_seed_decides_where_factors_start(structure) -> None:
    one, two = (opened(structure("llama"), seed=n).parameters for n in (0, 1))
    assert any(not torch.equal(one[name], two[name]) for name in one if ".lora_A." in name)


def test_making_factors_leaves_the_global_generator_alone(structure) -> None:
    model, student = load(structure("llama"))[0], open_checkpoint(structure("llama"))
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    make_trainable(model, student, Settings(rank=4))
    assert torch.equal(torch.rand(3), wanted)


def test_lora_takes_linears_and_norms_and_leaves_the_ends(structure) -> None:
    names = opened(structure("llama")).parameters
    assert {n.split(".")[4] for n in names if "lora_" in n} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert sum("norm" in name for name in names) == 9
    assert not any("embed" in name or "head" in name for name in names)


def test_lora_takes_experts(structure) -> None:
    names = opened(structure("mixtral")).parameters
    assert sum(".experts." in name and ".lora_A." in name for name in names) == 2 * 4


def test_towers_for_images_stay_as_they_are(structure) -> None:
    for mode in ("lora", "full", "half", "norms"):
        names = opened(structure("llava"), train=mode).parameters
        assert not any("vision" in name for name in names)


def test_ranks_do_not_exceed_a_side(structure) -> None:
    trainable = opened(structure("llama"), rank=64)
    assert max(min(p.shape) for n, p in trainable.parameters.items() if "lora_" in n) == 32


def test_layers_that_share_weights_share_factors(structure, tmp_path) -> None:
    student = run(tie(open_checkpoint(structure("llama")), blocks=2), tmp_path / "tied").out
    layers = opened(student).model.model.layers
    first, again = (layers[n].self_attn.q_proj.lora_B["default"].weight for n in (0, 2))
    assert first is again


def test_weight_decay_is_for_matrices(structure) -> None:
    trainable = opened(structure("llama"), train="full")
    matrices, others = trainable.groups(Settings(weight_decay=0.1))
    assert matrices["weight_decay"] == 0.1
    assert others["weight_decay"] == 0.0
    assert {p.dim() for p in others["params"]} == {1}
    both = len(matrices["params"]) + len(others["params"])
    assert both == len(trainable.parameters)


# Members of a layer of Llama: four maps of attention, three of the feed-forward part, two norms.
CATEGORIES = (("self_attn", 4), ("mlp", 3), ("norm", 2))


@pytest.mark.parametrize("seed", range(5))
def test_half_takes_half_of_each_category_of_each_layer(seed, structure) -> None:
    model = load(structure("llama"))[0]
    parameters = dict(model.named_parameters())
    chosen = half(list(parameters), parameters, seed)
    for word, members in CATEGORIES:
        counts = [
            sum(word in name and f".layers.{layer}." in name for name in chosen)
            for layer in range(4)
        ]
        assert sum(counts) == members * 4 // 2
        assert set(counts) <= {members // 2, -(-members // 2)}
    assert {n for n in parameters if ".layers." not in n} <= chosen


def test_half_is_the_same_for_a_seed_and_another_for_another(structure) -> None:
    model = load(structure("llama"))[0]
    parameters = dict(model.named_parameters())
    first, again, other = (half(list(parameters), parameters, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_bias_trains_with_its_matrix(structure) -> None:
    names = set(opened(structure("llama_bias"), train="half").parameters)
    biases = [name for name in names if name.endswith(".bias")]
    assert biases
    assert all(name.removesuffix("bias") + "weight" in names for name in biases)


@pytest.mark.parametrize("mode", ["lora", "full", "half"])
def test_zeros_stay_while_training(mode, structure, tmp_path) -> None:
    base = open_checkpoint(structure("llama"))
    plan = sparsify(base, method="magnitude", sparsity="0.5", include=["mlp"])
    student = run(plan, tmp_path / "sparse").out
    trainable = opened(student, train=mode)
    before = tensors(student)
    steps(trainable, Settings(train=mode))
    for module in plan.facts["masked"]:
        layer = trainable.model.get_submodule(module)
        weight = layer.weight
        if mode == "lora":
            weight = layer.get_base_layer().weight + layer.get_delta_weight("default")
        assert torch.all(weight[before[f"{module}.weight"] == 0] == 0)


def test_gradients_of_zeros_are_not_measured(structure, tmp_path) -> None:
    plan = sparsify(open_checkpoint(structure("llama")), method="magnitude", sparsity="0.5")
    trainable = opened(run(plan, tmp_path / "sparse").out, train="full")
    trainable.model(input_ids=IDS, labels=IDS).loss.backward()
    trainable.before_step()
    weight = trainable.parameters["model.layers.0.mlp.up_proj.weight"]
    assert weight.grad is not None
    assert torch.all(weight.grad[weight == 0] == 0)
    assert torch.any(weight.grad != 0)


def test_masked_factors_give_the_sum_that_they_say(structure, tmp_path) -> None:
    """Against W + M * (B A), put together by hand from what is stored and what was exported."""
    plan = sparsify(open_checkpoint(structure("llama")), method="magnitude", sparsity="0.5")
    student = run(plan, tmp_path / "sparse").out
    trainable = opened(student)
    steps(trainable, Settings())
    trainable.export(tmp_path / "trained")
    plain, stored = load(student)[0], tensors(tmp_path / "trained")
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            key = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{key}.lora_A.weight" in stored:
                product = stored[f"{key}.lora_B.weight"] @ stored[f"{key}.lora_A.weight"]
                parameter.add_(product * (parameter != 0))
            elif f"{key}.weight" in stored:
                parameter.copy_(stored[f"{key}.weight"])
    assert float((logits(plain) - logits(trainable.model)).abs().max()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_two_processes_export_what_one_does(mode, structure, tmp_path) -> None:
    plan = sparsify(open_checkpoint(structure("llama")), method="magnitude", sparsity="0.5")
    student = run(plan, tmp_path / "sparse").out
    tests = Path(__file__).parent
    runpy.run_path(str(tests / "sharded.py"))["main"](student, tmp_path / "1", mode)
    subprocess.run(
        (
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(tests / "sharded.py", student, tmp_path / "2", mode),
        ),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, tests.parents[:2]))},
        check=True,
        timeout=180,
        capture_output=True,
    )
    one, two = (tensors(tmp_path / str(count)) for count in (1, 2))
    assert one.keys() == two.keys()
    assert all(float((one[n] - two[n]).abs().max()) < 1e-5 for n in one)


def edited(path: Path, out: Path, **changes) -> Path:
    """A copy of a model with keys of its config changed."""
    shutil.copytree(path, out)
    config = json.loads((out / "config.json").read_text()) | changes
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"train": "new"}, "has none; take lora, full, norms or half"),
        ("llama", {"rank": 0}, "--rank 0: is below 1"),
        ("llama", {"train": "some"}, "is none of lora, full"),
        ("llama", {"lora_init": "magic"}, "--lora-init magic: is none of default"),
        ("llama", {"lora_init": "loftq"}, "starts from a quantised base"),
        ("llama", {"lora_init": "eva"}, "looks at inputs, and none are given"),
        ("llama", {"lora_init": "orthogonal", "rank": 1}, "needs an even rank"),
        ("gpt2", {"lora_init": "olora"}, r"stored \[in, out\]"),
        ("mixtral", {"lora_init": "pissa"}, "holds all experts"),
        ("llama", {"include": ("nothing",)}, "--include nothing: matches no linear layer"),
        ("llama", {"exclude": ("proj",)}, "finds no linear layer"),
    ],
)
def test_wrong_asks_are_refused_in_a_sentence(family, options, message, structure) -> None:
    with pytest.raises(SurgeryError, match=message) as caught:
        opened(structure(family), **options)
    assert "\n" not in str(caught.value)


def test_a_start_that_changes_zeros_is_refused(structure, tmp_path) -> None:
    plan = sparsify(open_checkpoint(structure("llama")), method="magnitude", sparsity="0.5")
    student = run(plan, tmp_path / "sparse").out
    with pytest.raises(SurgeryError, match="changes the zeros of"):
        opened(student, lora_init="pissa")


def test_a_start_that_changes_shared_weights_is_refused(structure, tmp_path) -> None:
    student = run(tie(open_checkpoint(structure("llama")), blocks=2), tmp_path / "tied").out
    with pytest.raises(SurgeryError, match="shares its own"):
        opened(student, lora_init="olora")


def test_a_student_with_nan_is_refused(structure, tmp_path) -> None:
    shutil.copytree(structure("llama"), tmp_path / "broken")
    held = tensors(tmp_path / "broken")
    held["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(held, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SurgeryError, match=r"NaN or infinity in model\.layers\.1\.mlp\.up_proj"):
        opened(tmp_path / "broken")


def test_a_quantised_student_is_refused(structure, tmp_path) -> None:
    method = {"quant_method": "gptq", "bits": 4}
    student = edited(structure("llama"), tmp_path / "packed", quantization_config=method)
    with pytest.raises(SurgeryError, match="is quantised"):
        make_trainable(load(structure("llama"))[0], open_checkpoint(student), Settings())


def test_a_student_of_other_files_is_refused(structure) -> None:
    model = load(structure("llama"))[0]
    for mode in ("full", "lora"):
        with pytest.raises(SurgeryError, match=re.compile("holds no|does not hold|of shape")):
            make_trainable(model, open_checkpoint(structure("gpt2")), Settings(train=mode))


def test_recorded_layers_that_are_not_there_are_refused(structure, tmp_path) -> None:
    shutil.copytree(structure("llama"), tmp_path / "model")
    record = {"surgery": 1, "facts": {"trainable_layers": [9]}}
    (tmp_path / "model" / "surgery.json").write_text(json.dumps(record))
    with pytest.raises(SurgeryError, match="layer 9"):
        opened(tmp_path / "model", train="new")
