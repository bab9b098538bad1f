"""Narrower models: the units that do least go, every layer to one size, and the rest keeps bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.main import main
from growth.cutting import parse_widths
from growth.narrow import narrow
from structures import example_inputs, load
from surgery.calibrate import calibrate
from surgery.checkpoint import open_checkpoint
from surgery.errors import RecipeError, SurgeryError
from surgery.evaluate import evaluate

FIXTURES = Path(__file__).parents[2] / "fixtures"
BASE, TEXT = FIXTURES / "base", FIXTURES / "heldout" / "mix.jsonl"


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    out = tmp_path_factory.mktemp("statistics") / "base.safetensors"
    calibrate(BASE, [TEXT], out, collect=("inputs",), samples=32)
    return open_checkpoint(out)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(path.glob("*.safetensors")) for k, v in load_file(file).items()}


def best(scores: torch.Tensor, count: int) -> list[int]:
    return sorted(scores.argsort(descending=True, stable=True)[:count].tolist())


def test_feed_forward_units_are_those_that_hand_on_most(statistics, write):
    """The whole cut again, in plain slices."""
    path = write(narrow(open_checkpoint(BASE), statistics, width="ffn=200"))
    new, old, seen = tensors(path), tensors(BASE), load_file(statistics.files[0])
    for layer in range(4):
        mlp = f"model.layers.{layer}.mlp"
        kept = best(seen[f"{mlp}.down_proj.absolute"], 200)
        assert torch.equal(new[f"{mlp}.up_proj.weight"], old[f"{mlp}.up_proj.weight"][kept])
        assert torch.equal(new[f"{mlp}.gate_proj.weight"], old[f"{mlp}.gate_proj.weight"][kept])
        assert torch.equal(new[f"{mlp}.down_proj.weight"], old[f"{mlp}.down_proj.weight"][:, kept])
    assert json.loads((path / "config.json").read_text())["intermediate_size"] == 200


def test_heads_go_with_what_they_read_and_write(statistics, write):
    path = write(narrow(open_checkpoint(BASE), statistics, width="heads=3"))
    new, old, seen = tensors(path), tensors(BASE), load_file(statistics.files[0])
    for layer in range(4):
        attention = f"model.layers.{layer}.self_attn"
        kept = best(seen[f"{attention}.o_proj.absolute"].view(4, 32).sum(1), 3)
        rows = [h * 32 + i for h in kept for i in range(32)]
        for role in ("q_proj", "k_proj", "v_proj"):
            name = f"{attention}.{role}.weight"
            assert torch.equal(new[name], old[name][rows])
        name = f"{attention}.o_proj.weight"
        assert torch.equal(new[name], old[name][:, rows])


def test_channels_are_the_same_in_every_layer(statistics, write):
    path = write(narrow(open_checkpoint(BASE), statistics, width="hidden=100"))
    new, old, seen = tensors(path), tensors(BASE), load_file(statistics.files[0])
    total = sum(
        seen[f"model.layers.{layer}.{role}.absolute"].sqrt()
        for layer in range(4)
        for role in ("self_attn.q_proj", "mlp.up_proj")
    )
    kept = best(total, 100)
    assert torch.equal(new["model.embed_tokens.weight"], old["model.embed_tokens.weight"][:, kept])
    name = "model.layers.2.mlp.down_proj.weight"
    assert torch.equal(new[name], old[name][kept])
    assert torch.equal(new["model.norm.weight"], old["model.norm.weight"][kept])


def test_units_that_do_nothing_go_without_a_trace(tmp_path, write):
    """Half the units write nothing: the narrower model computes what the wide one did."""
    wide = tmp_path / "wide"
    wide.mkdir()
    weights = tensors(BASE)
    for layer in range(4):
        weights[f"model.layers.{layer}.mlp.up_proj.weight"][layer % 2 :: 2] = 0
    save_file(weights, wide / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (wide / name).write_bytes((BASE / name).read_bytes())
    out = tmp_path / "s.safetensors"
    calibrate(wide, [TEXT], out, collect=("inputs",), samples=8)
    path = write(narrow(open_checkpoint(wide), open_checkpoint(out), width="ffn=176"))
    found = evaluate([wide, path], [TEXT])
    assert abs(found.models[1].domains[0].difference.bits_per_byte) < 1e-5


def test_dropping_what_does_least_beats_dropping_what_comes_last(statistics, write):
    base = open_checkpoint(BASE)
    chosen = write(narrow(base, statistics, width="ffn=224"), "chosen")
    first = write(narrow(base, None, width="ffn=224"), "first")
    found = evaluate([chosen, first], [TEXT])
    assert found.models[1].domains[0].difference.low > 0


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("llama", "hidden=24,ffn=32,heads=2,kv-heads=2"),
        ("llama_bias", "heads=2,kv-heads=1"),
        ("mistral", "ffn=20,heads=2"),
        ("qwen2", "hidden=16,kv-heads=1"),
        ("qwen3", "hidden=24,heads=2"),
        ("gemma2", "ffn=32,kv-heads=1"),
        ("olmo2", "hidden=24,heads=2,kv-heads=1"),
        ("gpt2", "hidden=24,ffn=64,heads=3"),
        ("gpt_neox", "ffn=24"),
        ("phi3", "ffn=24,kv-heads=1"),
        ("starcoder2", "hidden=24,ffn=24"),
        ("bert", "hidden=24,heads=3,ffn=20"),
    ],
)
def test_the_stock_class_loads_and_runs_it(opened, write, name, width):
    path = write(narrow(opened(name), None, width=width))
    model, info = load(name, path)
    assert not any(info[kind] for kind in info)
    with torch.inference_mode():
        assert bool(model(**example_inputs(name)).logits.isfinite().all())


@pytest.mark.parametrize(
    ("name", "width", "told"),
    [
        ("llama", "ffn", "no size of"),
        ("llama", "depth=3", "no size of"),
        ("llama", "ffn=8,ffn=9", "names ffn twice"),
        ("llama", "ffn=480", "above the model's 48"),
        ("llama", "ffn=48", "the model's own size"),
        ("llama", "heads=3", "3 heads for 2 groups"),
        ("llama", "kv-heads=1,heads=4", "with kv-heads=1 give heads=2 at most"),
        ("gpt2", "hidden=24", "cut hidden and heads in step"),
        ("gemma2", "hidden=16", "square root of the width"),
        ("mixtral", "ffn=16", "not known well enough"),
        ("deepseek_v3", "ffn=16", "not known"),
    ],
)
def test_wrong_asks_are_refused(opened, name, width, told):
    with pytest.raises(SurgeryError, match=told):
        narrow(opened(name), None, width=width)


def test_sizes_are_parsed():
    assert parse_widths("hidden=16, kv-heads=2") == {"hidden": 16, "kv-heads": 2}
    with pytest.raises(RecipeError):
        parse_widths("hidden=0")


def test_the_command_needs_text_and_reproduces(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["prune", str(BASE), "--width", "ffn=176,heads=2", "-o", str(out)]
    assert main(words) == 2
    assert "needs --calibration" in capsys.readouterr().err
    assert main([*words, "--calibration", str(TEXT), "--samples", "4"]) == 0
    assert main(["reproduce", str(out)]) == 0
    assert main(["prune", str(BASE)]) == 2


def test_a_note_sums_up_old_and_new_sizes(statistics):
    base = open_checkpoint(BASE)
    plan = narrow(base, statistics, width="ffn=200,heads=3,kv-heads=3")
    kept = sum(spec.numel for step in plan.steps for _, spec in step.outputs)
    share = kept / sum(tensor.numel for tensor in base.tensors.values())
    told = f"ffn 352 -> 200, heads 4 -> 3, kv-heads 4 -> 3; {share:.1%} of the parameters stay"
    assert plan.notes[-1] == told
