"""A mixture computes what the dense model did, and what starts anew is a neuron, not three."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from growth.upcycle import upcycle
from structures import example_inputs, load
from surgery.checkpoint import open_checkpoint
from surgery.errors import SurgeryError

EXACT = 1e-5
DENSE = ("llama", "llama_tied", "mistral", "qwen2", "qwen3_full", "qwen3_sliding")
WINDOWS = {"qwen3_full": ["full_attention"] * 4, "qwen3_sliding": ["sliding_attention"] * 4}


@pytest.fixture(scope="module")
def dense(structure, tmp_path_factory):
    """A dense fixture by name; qwen3 with one kind of window, which is all its mixture knows."""
    made = {}

    def get(name):
        if name not in WINDOWS:
            return structure(name)
        if name not in made:
            source = structure("qwen3")
            made[name] = tmp_path_factory.mktemp("dense") / name
            made[name].mkdir()
            for path in source.iterdir():
                (made[name] / path.name).write_bytes(path.read_bytes())
            config = json.loads((source / "config.json").read_text())
            config["layer_types"] = WINDOWS[name]
            (made[name] / "config.json").write_text(json.dumps(config))
        return made[name]

    return get


def model_at(path):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def distance(path, base):
    inputs = example_inputs("llama")
    before = load("llama", base)[0](**inputs).logits
    return float((model_at(path)(**inputs).logits - before).abs().max())


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("ask", [{}, {"top_k": 1}, {"experts": 3, "top_k": 3}], ids=str)
def test_a_mixture_of_copies_is_the_dense_model(name, ask, dense, write):
    plan = upcycle(open_checkpoint(dense(name)), **{"experts": 4, **ask})
    assert distance(write(plan), dense(name)) <= EXACT


@pytest.mark.parametrize("name", DENSE)
def test_some_layers_may_stay_dense(name, dense, write):
    plan = upcycle(open_checkpoint(dense(name)), experts=4, layers="1-2")
    assert plan.config["mlp_only_layers"] == [0, 3]
    assert distance(write(plan), dense(name)) <= EXACT


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_the_layout_of_qwen2_holds_models_without_biases(name, dense, write):
    plan = upcycle(open_checkpoint(dense(name)), experts=4, layout="qwen2-moe")
    assert distance(write(plan), dense(name)) <= EXACT


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("llama", "mixtral"),
        ("mistral", "mixtral"),
        ("qwen2", "qwen2_moe"),
        ("qwen3_full", "qwen3_moe"),
    ],
)
def test_the_layout_is_the_first_that_holds_the_attention(name, family, dense):
    config = upcycle(open_checkpoint(dense(name)), experts=4).config
    assert config["model_type"] == family
    assert config["num_experts_per_tok"] == 2


def test_experts_are_stored_one_by_one(dense):
    names = upcycle(open_checkpoint(dense("llama")), experts=3).order
    assert "model.layers.0.block_sparse_moe.experts.2.w3.weight" in names
    assert not [name for name in names if ".mlp." in name]


def test_copies_of_one_tensor_are_read_once(dense):
    base = open_checkpoint(dense("llama"))
    assert upcycle(base, experts=8).bytes_in == base.nbytes


def test_what_the_dense_class_takes_for_granted_is_said(dense, tmp_path):
    """A sparse config: Mixtral's class has another rotary base, epsilon and number of heads."""
    config = json.loads((dense("llama") / "config.json").read_text())
    bare = {k: v for k, v in config.items() if k not in ("rope_parameters", "rms_norm_eps")}
    bare = {k: v for k, v in bare.items() if k not in ("head_dim", "bos_token_id")}
    folder = tmp_path / "base"
    folder.mkdir()
    for path in dense("llama").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text(json.dumps(bare))
    made = upcycle(open_checkpoint(folder), experts=2).config
    told = {key: made[key] for key in ("rope_theta", "rms_norm_eps", "head_dim", "bos_token_id")}
    assert told == {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "head_dim": 8, "bos_token_id": 1}


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3_sliding"])
@pytest.mark.parametrize("length", [3, 12])
def test_greedy_decoding_needs_no_cache(name, length, dense, write):
    """The windows are 8 tokens wide."""
    model = model_at(write(upcycle(open_checkpoint(dense(name)), experts=4, drop_ratio=0.5)))
    start = example_inputs("llama")["input_ids"][:1, :length]
    made = [
        model.generate(start, max_new_tokens=8, do_sample=False, use_cache=cached, pad_token_id=0)
        for cached in (True, False)
    ]
    assert torch.equal(*made)


def test_a_fresh_process_computes_the_same(dense, write):
    made = write(upcycle(open_checkpoint(dense("llama")), experts=4))
    inputs = example_inputs("llama")["input_ids"].tolist()
    program = (
        "import sys, json, torch; from transformers import AutoModelForCausalLM as A;"
        "m = A.from_pretrained(sys.argv[1], dtype=torch.float32).eval();"
        "x = torch.tensor(json.loads(sys.argv[2]));"
        "print(json.dumps(m(x).logits.tolist()))"
    )
    words = [sys.executable, "-c", program, str(made), json.dumps(inputs)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    with torch.no_grad():
        before = load("llama", dense("llama"))[0](torch.tensor(inputs)).logits
    after = torch.tensor(json.loads(done.stdout))
    assert float((after - before).abs().max()) <= EXACT


def tensors_of(path):
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


def renewed(path, base, expert, layer=0):
    """Per projection which neurons of an expert differ from the dense model's."""
    new, old = tensors_of(path), tensors_of(base)
    found = {}
    for dense_name, own, axis in (("gate", "w1", 1), ("up", "w3", 1), ("down", "w2", 0)):
        after = new[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{own}.weight"]
        before = old[f"model.layers.{layer}.mlp.{dense_name}_proj.weight"]
        share = (after != before).float().mean(axis)  # single numbers may be drawn as they were
        found[dense_name] = share > 0.9
        assert not share[~found[dense_name]].any()
    return found


def test_whole_neurons_start_anew(dense, write):
    made = write(upcycle(open_checkpoint(dense("llama")), experts=3, drop_ratio=0.5))
    for expert in range(3):
        found = renewed(made, dense("llama"), expert)
        assert int(found["gate"].sum()) == 24
        assert torch.equal(found["gate"], found["up"])
        assert torch.equal(found["gate"], found["down"])


def test_experts_and_layers_choose_their_own_neurons(dense, write):
    made = write(upcycle(open_checkpoint(dense("llama")), experts=3, drop_ratio=0.5))
    places = [(expert, layer) for expert in range(3) for layer in range(4)]
    choices = {tuple(renewed(made, dense("llama"), *place)["up"].tolist()) for place in places}
    assert len(choices) == len(places)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model wide enough for statistics; each projection has its own mean and spread."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for n, each in enumerate(("gate_proj", "up_proj", "down_proj"), start=1):
            weight = getattr(model.model.layers[0].mlp, each).weight
            weight.normal_(mean=0.3 * n, std=0.1 * n)
    path = tmp_path_factory.mktemp("wide")
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_new_neurons_have_the_statistics_of_those_they_replace(ratio, wide, write):
    made = write(upcycle(open_checkpoint(wide), experts=2, drop_ratio=ratio))
    found, new, old = renewed(made, wide, 1), tensors_of(made), tensors_of(wide)
    for name, own, axis in (("gate", "w1", 0), ("up", "w3", 0), ("down", "w2", 1)):
        at = found[name].nonzero()[:, 0]
        assert len(at) == int(ratio * 1024)
        before = old[f"model.layers.0.mlp.{name}_proj.weight"].index_select(axis, at)
        after = new[f"model.layers.0.block_sparse_moe.experts.1.{own}.weight"]
        after = after.index_select(axis, at)
        error = 5 * float(before.std()) / before.numel() ** 0.5
        assert abs(float(after.mean() - before.mean())) < error
        assert float(after.std() / before.std()) == pytest.approx(1, abs=0.02)
        assert not torch.equal(after, before)


def test_noise_has_the_asked_share_of_the_spread(wide, write):
    made = write(upcycle(open_checkpoint(wide), experts=2, noise=0.1))
    new, old = tensors_of(made), tensors_of(wide)
    before = old["model.layers.0.mlp.up_proj.weight"]
    moves = [new[f"model.layers.0.block_sparse_moe.experts.{n}.w3.weight"] - before for n in (0, 1)]
    assert float(moves[0].std() / before.std()) == pytest.approx(0.1, rel=0.02)
    assert abs(float((moves[0] * moves[1]).mean() / moves[0].var())) < 0.02


def test_routers_are_small_random_and_differ_by_layer(dense, write):
    made = tensors_of(write(upcycle(open_checkpoint(dense("llama")), experts=64, router_std=0.5)))
    routers = [made[f"model.layers.{n}.block_sparse_moe.gate.weight"] for n in range(4)]
    assert routers[0].shape == (64, 32)
    assert float(torch.stack(routers).std()) == pytest.approx(0.5, rel=0.05)
    assert not torch.equal(routers[0], routers[1])


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("ask", [{}, {"drop_ratio": 0.5}, {"noise": 0.1}], ids=str)
def test_the_bytes_depend_on_the_seed_alone(ask, workers, wide, tmp_path):
    from surgery.run import run

    def made(name, **more):
        plan = upcycle(open_checkpoint(wide), experts=2, **ask, **more)
        return (run(plan, tmp_path / name, workers=workers).out / "model.safetensors").read_bytes()

    assert made("one") == made("two")
    assert made("one2") != made("three", seed=1)


def test_a_plan_says_what_is_not_exact(dense):
    base = open_checkpoint(dense("llama"))
    assert upcycle(base, experts=4).notes == ()
    assert "start anew" in " ".join(upcycle(base, experts=4, drop_ratio=0.5).notes)
    assert "not exactly" in " ".join(upcycle(base, experts=4, noise=0.1).notes)
    assert "balancing loss" in " ".join(upcycle(base, experts=4, top_k=1).notes)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3_full"])
def test_figures_count_the_result(name, dense, write):
    plan = upcycle(open_checkpoint(dense(name)), experts=4, layers="0-3")
    assert plan.facts["parameters"] == sum(spec.numel for spec in plan.outputs.values())
    assert plan.facts["active"] == plan.facts["parameters"] - 4 * 2 * 3 * 32 * 48


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        ({"experts": 1}, "outside 2 to"),
        ({"experts": 4, "top_k": 5}, "outside 1 to 4"),
        ({"experts": 4, "top_k": 0}, "outside 1 to 4"),
        ({"experts": 4, "drop_ratio": 1.5}, "outside 0 to 1"),
        ({"experts": 4, "drop_ratio": float("nan")}, "outside 0 to 1"),
        ({"experts": 4, "drop_ratio": 0.001}, "starts none of 48 neurons"),
        ({"experts": 4, "noise": -1.0}, "no standard deviation"),
        ({"experts": 4, "router_std": float("inf")}, "no standard deviation"),
        ({"experts": 4, "layers": "7"}, "names layer 7"),
        ({"experts": 4, "layout": "deepseek"}, "is no mixture layout"),
        ({"experts": 4, "layout": "qwen3-moe"}, "needs self_attn.k_norm.weight"),
        ({"experts": 4, "layout": "mixtral", "layers": "0"}, "makes every layer a mixture"),
    ],
    ids=str,
)
def test_wrong_asks_are_refused(ask, told, dense):
    with pytest.raises(SurgeryError, match=told):
        upcycle(open_checkpoint(dense("llama")), **ask)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("llama_bias", "fits no mixture layout|feed-forward"),
        ("qwen3", "one attention window for all layers"),
        ("gpt2", "no mixture layout is known"),
        ("gemma2", "no mixture layout is known"),
        ("mixtral", "a mixture of 4 experts already"),
        ("qwen3_moe", "experts already"),
        ("bert", "no mixture layout is known"),
    ],
)
def test_models_that_fit_no_layout_are_refused(name, told, structure):
    with pytest.raises(SurgeryError, match=told):
        upcycle(open_checkpoint(structure(name)), experts=4)


def test_a_bare_file_is_refused(dense):
    with pytest.raises(SurgeryError, match=r"no config\.json"):
        upcycle(open_checkpoint(dense("llama") / "model.safetensors"), experts=4)


def test_planning_loads_no_torch(dense):
    program = (
        "import sys; from growth.upcycle import upcycle; from growth.upcycle.moe import moe;"
        "from surgery.checkpoint import open_checkpoint as o;"
        "b = o(sys.argv[1]); upcycle(b, experts=4, drop_ratio=0.5); moe(b, b);"
        "assert 'torch' not in sys.modules"
    )
    words = [sys.executable, "-c", program, str(dense("llama"))]
    subprocess.run(words, check=True, timeout=60)


def test_the_command_writes_what_reproduce_repeats(dense, tmp_path, capsys):
    from cli.main import main

    out = tmp_path / "moe"
    words = ["upcycle", str(dense("qwen2")), "--experts", "4", "--drop-ratio", "0.5"]
    assert main([*words, "-o", str(out)]) == 0
    assert main(["verify", str(out)]) == 0
    assert main(["reproduce", str(out)]) == 0
    assert "identical" in capsys.readouterr().out
