"""A widened model computes what the model did, after save and reload by transformers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from layer_oracle import generated, logits

from growth.widen import widen
from structures import STRUCTURES, is_decoder, load
from surgery.checkpoint import open_checkpoint

UNKNOWN = {"falcon", "deepseek_v3", "gpt_oss", "qwen3_next", "gemma3", "llava", "qwen2_vl"}
KNOWN = [name for name in STRUCTURES if name not in UNKNOWN]
ASKS = {
    "twice": {"factor": 2},
    "three times": {"factor": 3},
    "with noise": {"factor": 2, "noise": 0.3},
    "three times with noise": {"factor": 3, "noise": 0.4},
    "to twice the width": {"to": 64},
    "only inside": {"to": 32, "intermediate_size": 192},
}
CASES = [(name, ask) for name in KNOWN for ask in ASKS]


@pytest.fixture(scope="session")
def wide(opened, write):
    """Path, model and loading info of a widened structure."""
    made = {}

    def get(name, ask):
        if (name, ask) not in made:
            path = write(widen(opened(name), **ASKS[ask]))
            made[name, ask] = (path, *load(name, path))
        return made[name, ask]

    return get


@pytest.mark.parametrize(("name", "ask"), CASES)
def test_logits_are_the_same(name, ask, wide, parent):
    _, model, info = wide(name, ask)
    assert {key: value for key, value in info.items() if value} == {}
    assert (logits(model) - logits(parent(name))).abs().max() <= 1e-5


@pytest.mark.parametrize(("name", "ask"), CASES)
def test_widths_grow_and_those_of_heads_do_not(name, ask, wide, parent):
    old, new = parent(name).config, wide(name, ask)[1].config
    times = ASKS[ask].get("factor") or ASKS[ask]["to"] // 32
    assert new.hidden_size == times * old.hidden_size
    assert new.num_attention_heads == times * old.num_attention_heads
    assert width_of_a_head(new) == width_of_a_head(old)


def width_of_a_head(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@pytest.mark.parametrize("name", [name for name in KNOWN if is_decoder(name)])
@pytest.mark.parametrize("ask", ["twice", "three times with noise"])
def test_generates_the_same_with_and_without_a_cache(name, ask, wide, parent):
    _, model, _ = wide(name, ask)
    wanted = generated(parent(name))
    assert generated(model) == wanted
    model.generation_config.use_cache = False
    assert generated(model) == wanted


@pytest.mark.parametrize("ask", [{"factor": 2}, {"factor": 3}, {"factor": 3, "noise": 0.3}])
def test_a_trained_bfloat16_model_differs_by_rounding_alone(ask, fixtures_dir, write):
    """Its own logits in float32 are 3e-5 off those in float64, and are as large as 16."""
    import transformers

    def computed(path):
        auto = transformers.AutoModelForCausalLM
        return logits(auto.from_pretrained(path, dtype=torch.float32).eval())

    before = computed(fixtures_dir / "base")
    after = computed(write(widen(open_checkpoint(fixtures_dir / "base"), **ask)))
    assert (after - before).abs().max() <= 3e-6 * before.abs().max()


def test_a_fresh_process_loads_it(wide, parent):
    path, _, _ = wide("qwen3", "with noise")
    code = (
        "import sys, json, torch, transformers as t;"
        "m = t.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval();"
        "print(json.dumps(m(torch.arange(24)[None], use_cache=False).logits.tolist()))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    with torch.no_grad():
        wanted = parent("qwen3")(torch.arange(24)[None], use_cache=False).logits
    assert (torch.tensor(json.loads(ran.stdout)) - wanted).abs().max() <= 1e-5


def test_a_head_that_is_stored_beside_its_tie_counts_as_tied(structure, tmp_path, write, parent):
    import shutil

    from safetensors.torch import load_file, save_file

    path = tmp_path / "tied"
    shutil.copytree(structure("llama_tied"), path)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    model, _ = load("llama_tied", write(widen(open_checkpoint(path), factor=2)))
    assert (logits(model) - logits(parent("llama_tied"))).abs().max() <= 1e-5


def test_the_bytes_do_not_depend_on_workers_or_memory(opened, tmp_path):
    from surgery.run import run

    plan = widen(opened("gpt2"), factor=3, noise=0.3)
    made = [
        run(plan, tmp_path / f"{n}", workers=n, memory=memory).out / "model.safetensors"
        for n, memory in ((1, 1 << 30), (3, 1 << 26))
    ]
    assert made[0].read_bytes() == made[1].read_bytes()


def test_a_record_gives_the_same_bytes_again(opened, tmp_path):
    from cli.operations import find_operation
    from surgery.run import run

    plan = widen(opened("qwen2"), factor=2, noise=0.2, seed=5)
    path = run(plan, tmp_path / "first").out
    told = json.loads((path / "surgery.json").read_text())
    again = find_operation("widen").compile_plan(opened("qwen2"), **told["parameters"])
    second = run(again, tmp_path / "second").out
    names = "model.safetensors", "config.json"
    assert all((path / n).read_bytes() == (second / n).read_bytes() for n in names)
