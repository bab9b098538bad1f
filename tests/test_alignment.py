"""Models put into one another's basis: the same function, and a shuffled copy put right again."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from architectures import ARCHITECTURES
from cli.main import main
from quantising import checkpoint_of, read_all
from structures import auto_class, example_inputs, load
from surgery.alignment import align, match_experts
from surgery.checkpoint import open_checkpoint
from surgery.errors import CheckpointError, PlanError
from surgery.run import run

# Family: kinds of units that may move in it.
FAMILIES = {
    "llama": {"self_attn", "mlp"},
    "llama_bias": {"self_attn", "mlp"},
    "mistral": {"self_attn", "mlp"},
    "qwen2": {"self_attn", "mlp"},
    "qwen3": {"self_attn", "mlp"},
    "gemma2": {"self_attn", "mlp"},
    "gemma3_text": {"self_attn", "mlp"},
    "olmo2": {"self_attn", "mlp"},
    "smollm3": {"self_attn", "mlp"},
    "cohere2": {"self_attn", "mlp"},
    "starcoder2": {"self_attn", "mlp"},
    "phi3": {"self_attn", "mlp"},
    "gpt_neox": {"attention", "mlp"},
    "mixtral": {"self_attn", "experts"},
    "qwen3_moe": {"self_attn", "mlp", "experts"},
    "deepseek_v3": {"self_attn", "mlp", "shared_experts", "experts"},
    "gpt_oss": {"self_attn", "experts"},
    "qwen3_next": {"experts", "shared_expert"},
    "gemma3": {"self_attn", "mlp"},
    "llava": {"self_attn", "mlp"},
}


def _logits(name, path):
    model, info = load(name, path)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        return model(**example_inputs(name)).logits


def _stranger(name, folder):
    """Another random model of the same structure."""
    config = transformers.AutoConfig.for_model(
        ARCHITECTURES[name].model_type, **ARCHITECTURES[name].config
    )
    torch.manual_seed(5)
    model = auto_class(name).from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def _tensors(path):
    return {n: t for file in open_checkpoint(path).files for n, t in load_file(file).items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_an_aligned_model_computes_what_it_did(tmp_path, structure, name):
    source = structure(name)
    plan = align(open_checkpoint(source), open_checkpoint(_stranger(name, tmp_path / "other")))
    groups = plan.facts["groups"]
    assert {group.rpartition(".")[2] for group in groups} == FAMILIES[name]
    assert all(group["moved"] for group in groups.values() if group["units"] > 4)
    assert all(group["cosine_after"] >= group["cosine_before"] for group in groups.values())
    run(plan, tmp_path / "out")
    moved, before = _logits(name, tmp_path / "out"), _logits(name, source)
    assert not torch.equal(moved, before)  # numbers are added in another order
    assert torch.allclose(moved, before, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_moved_is_moved_back_bit_for_bit(tmp_path, structure, name):
    """A model aligned with a stranger is a shuffled copy: aligned with itself it is restored."""
    source = structure(name)
    there = align(open_checkpoint(source), open_checkpoint(_stranger(name, tmp_path / "other")))
    run(there, tmp_path / "shuffled")
    shuffled = _tensors(tmp_path / "shuffled")
    original = _tensors(source)
    assert any(not torch.equal(shuffled[n], original[n]) for n in original)
    run(align(open_checkpoint(tmp_path / "shuffled"), open_checkpoint(source)), tmp_path / "back")
    back = _tensors(tmp_path / "back")
    assert set(back) == set(original)
    assert all(torch.equal(back[n], original[n]) for n in original)


def _shuffle_heads(tensors, config, rng):
    """Permute hidden units, groups of heads and heads in them, layer by layer, by the book."""
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    share = heads // keys
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        units = torch.from_numpy(rng.permutation(config["intermediate_size"]))
        for role in ("gate_proj", "up_proj"):
            tensors[f"{at}.mlp.{role}.weight"] = tensors[f"{at}.mlp.{role}.weight"][units]
        down = f"{at}.mlp.down_proj.weight"
        tensors[down] = tensors[down][:, units]
        groups = rng.permutation(keys)
        order = [g * share + h for g in groups for h in rng.permutation(share)]
        for role, places in (("q_proj", order), ("k_proj", groups), ("v_proj", groups)):
            name = f"{at}.self_attn.{role}.weight"
            width = len(tensors[name]) // len(places)
            tensors[name] = torch.cat([tensors[name][p * width :][:width] for p in places])
        name = f"{at}.self_attn.o_proj.weight"
        width = tensors[name].shape[1] // heads
        columns = [tensors[name][:, p * width : (p + 1) * width] for p in order]
        tensors[name] = torch.cat(columns, dim=1)
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shuffled_copy_is_put_right_bit_for_bit(tmp_path, structure, dtype):
    config = json.loads((structure("llama") / "config.json").read_text())
    config |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
    original = {n: t.to(dtype) for n, t in _tensors(structure("llama")).items()}
    for n in [n for n in original if "k_proj" in n or "v_proj" in n]:
        original[n] = torch.randn(16, 32, generator=torch.Generator().manual_seed(3)).to(dtype)
    shuffled = _shuffle_heads(dict(original), config, np.random.default_rng(0))
    kind = config.pop("model_type")
    reference = checkpoint_of(tmp_path / "a", original, model_type=kind, **config)
    source = checkpoint_of(tmp_path / "b", shuffled, model_type=kind, **config)
    plan = align(open_checkpoint(source), open_checkpoint(reference))
    run(plan, tmp_path / "out")
    back = _tensors(tmp_path / "out")
    assert all(torch.equal(back[n], original[n]) for n in original)
    after = [group["cosine_after"] for group in plan.facts["groups"].values()]
    assert after == pytest.approx([1.0] * len(after))


@pytest.mark.parametrize("layouts", [*itertools.product(["single", "fused"], repeat=2)])
def test_mixtures_are_aligned_in_the_layout_they_have(tmp_path, layouts):
    config = ARCHITECTURES["qwen3_moe"].config
    kinds = {"single": True, "fused": False}
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model("qwen3_moe", **config), dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "m", save_original_format=kinds[layouts[0]])
    torch.manual_seed(2)
    model.apply(model._init_weights)
    model.save_pretrained(tmp_path / "r", save_original_format=kinds[layouts[1]])
    source, reference = open_checkpoint(tmp_path / "m"), open_checkpoint(tmp_path / "r")
    run(align(source, reference), tmp_path / "out")
    assert set(open_checkpoint(tmp_path / "out").tensors) == set(source.tensors)
    before, after = _logits("qwen3_moe", tmp_path / "m"), _logits("qwen3_moe", tmp_path / "out")
    assert torch.allclose(before, after, atol=2e-5, rtol=2e-5)
    run(align(open_checkpoint(tmp_path / "out"), source), tmp_path / "back")
    back, original = _tensors(tmp_path / "back"), _tensors(tmp_path / "m")
    assert all(torch.equal(back[n], original[n]) for n in original)


def test_experts_are_matched_with_their_router(tmp_path, structure):
    source = structure("mixtral")
    tensors, order = _tensors(source), [2, 0, 3, 1]
    prefix = "model.layers.1.block_sparse_moe"
    moved = dict(tensors)
    for place, expert in enumerate(order):
        for role in ("w1", "w2", "w3"):
            moved[f"{prefix}.experts.{place}.{role}.weight"] = tensors[
                f"{prefix}.experts.{expert}.{role}.weight"
            ]
    moved[f"{prefix}.gate.weight"] = tensors[f"{prefix}.gate.weight"][order]
    config = json.loads((source / "config.json").read_text())
    shuffled = open_checkpoint(checkpoint_of(tmp_path / "b", moved, **config))
    found = match_experts(open_checkpoint(source), shuffled)
    assert found.orders[prefix] == tuple(np.argsort(order))
    assert found.orders["model.layers.0.block_sparse_moe"] == (0, 1, 2, 3)
    assert found.facts["groups"][f"{prefix}.experts"]["moved"] == 4
    got = read_all(found.checkpoint)
    assert all(torch.equal(got[n], tensors[n]) for n in tensors)


def test_experts_stay_in_the_groups_they_are_routed_in(tmp_path, structure):
    """DeepSeek routes to groups first: experts move inside a group, and groups as wholes."""
    source = open_checkpoint(structure("deepseek_v3"))
    other = open_checkpoint(_stranger("deepseek_v3", tmp_path / "other"))
    for order in match_experts(other, source).orders.values():
        assert {frozenset(order[:2]), frozenset(order[2:])} == {
            frozenset({0, 1}),
            frozenset({2, 3}),
        }


def test_alignment_is_the_best_of_all_permutations(tmp_path):
    """Two layers of five hidden units: no permutation has a larger sum of inner products."""
    shapes = {"gate_proj": (5, 8), "up_proj": (5, 8), "down_proj": (8, 5)}
    rng = torch.Generator().manual_seed(0)
    models = [
        {"model.embed_tokens.weight": torch.ones(9, 8)}
        | {
            f"model.layers.{n}.mlp.{role}.weight": torch.randn(shape, generator=rng)
            for n in range(2)
            for role, shape in shapes.items()
        }
        for _ in range(2)
    ]
    paths = [checkpoint_of(tmp_path / k, m, hidden_size=8, num_hidden_layers=2)
             for k, m in zip("ab", models, strict=True)]  # fmt: skip
    run(align(*map(open_checkpoint, paths)), tmp_path / "out")
    out = _tensors(tmp_path / "out")
    for n in range(2):
        own = {r: models[0][f"model.layers.{n}.mlp.{r}.weight"].double() for r in shapes}
        theirs = {r: models[1][f"model.layers.{n}.mlp.{r}.weight"].double() for r in shapes}
        sums = {}
        for order in itertools.permutations(range(5)):
            p = list(order)
            moved = {r: t[:, p] if r == "down_proj" else t[p] for r, t in own.items()}
            sums[order] = sum(float((moved[r] * theirs[r]).sum()) for r in shapes)
        best = list(max(sums, key=sums.get))
        assert torch.equal(
            out[f"model.layers.{n}.mlp.up_proj.weight"].double(), own["up_proj"][best]
        )
        down = own["down_proj"][:, best]
        assert torch.equal(out[f"model.layers.{n}.mlp.down_proj.weight"].double(), down)


@pytest.mark.parametrize("name", ["gpt2", "falcon", "bert"])
def test_what_is_not_known_to_be_safe_is_left_or_refused(tmp_path, structure, name):
    source, other = open_checkpoint(structure(name)), _stranger(name, tmp_path / "other")
    if name == "falcon":  # its feed-forward is known, its fused attention is not
        plan = align(source, open_checkpoint(other))
        assert all(group.endswith(".mlp") for group in plan.facts["groups"])
        assert "self_attention is of a kind whose heads are not known" in plan.facts["left_alone"]
        return
    with pytest.raises(CheckpointError, match="no units that are known to be free"):
        align(source, open_checkpoint(other))


def test_other_architectures_are_refused(structure):
    llama = open_checkpoint(structure("llama"))
    with pytest.raises(CheckpointError, match="name two models of the same architecture"):
        align(llama, open_checkpoint(structure("qwen3")))
    with pytest.raises(CheckpointError, match="no experts that are known"):
        match_experts(llama, llama)


def test_memory_is_told_before_it_is_taken(structure):
    llama = open_checkpoint(structure("llama"))
    with pytest.raises(PlanError, match=r"mlp: comparing its units takes \d+ MiB, over the budget"):
        align(llama, llama, memory=1 << 20)


def test_a_model_aligned_with_itself_is_copied(tmp_path, structure):
    source = open_checkpoint(structure("qwen3"))
    plan = align(source, source)
    assert all(step.is_copy for step in plan.steps)
    assert all(group["moved"] == 0 for group in plan.facts["groups"].values())


def test_the_result_does_not_depend_on_threads(tmp_path, structure, monkeypatch):
    source = open_checkpoint(structure("qwen3_moe"))
    other = open_checkpoint(_stranger("qwen3_moe", tmp_path / "other"))
    digests = set()
    for cores in (1, 4):
        monkeypatch.setattr("os.cpu_count", lambda n=cores: n)
        digests.add(align(source, other, memory=4 << 30).facts["permutations"])
    assert len(digests) == 1


def test_an_interrupt_ends_comparing(structure):
    def interrupt(done, total):
        raise KeyboardInterrupt

    llama = open_checkpoint(structure("llama"))
    with pytest.raises(KeyboardInterrupt):
        align(llama, llama, progress=interrupt)


def test_progress_reaches_all_that_is_compared(structure):
    told = []
    mixtral = open_checkpoint(structure("mixtral"))
    align(mixtral, mixtral, progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] > 0
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_the_command_aligns_records_and_reproduces(tmp_path, structure, capsys):
    source, other = structure("llama"), _stranger("llama", tmp_path / "other")
    out = tmp_path / "out"
    assert main(["align", str(other), str(source), "-o", str(out), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["work"]["permute"]["steps"] > 0
    assert not out.exists()
    assert main(["align", str(other), str(source), "-o", str(out)]) == 0
    assert "cosine before" in capsys.readouterr().out
    record = json.loads((out / "surgery.json").read_text())
    assert len(record["facts"]["permutations"]) == 64
    assert record["facts"]["groups"]["model.layers.0.mlp"]["moved"] > 0
    assert main(["reproduce", str(out)]) == 0
    assert main(["verify", str(out)]) == 0
