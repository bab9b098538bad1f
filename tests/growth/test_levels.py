"""Coalesce, de-coalesce, interpolate: the paper's matrices, whole heads, and the identity."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from layer_oracle import generated, logits, stored
from safetensors.torch import load_file, save_file

from cli.main import main
from growth.levels import coalesce, decoalesce, interpolate
from structures import build, load
from surgery.checkpoint import open_checkpoint
from surgery.errors import PlanError, RecipeError

WIDE = [
    "bert", "cohere2", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "llama", "llama_tied",
    "llama_bias", "mistral", "mixtral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3",
    "starcoder2",
]  # fmt: skip
UNKNOWN = ["falcon", "deepseek_v3", "gpt_oss", "qwen3_next", "llava"]
SIZES = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def llama(out, **changes):
    """A random Llama of given sizes, its gains moved off one."""
    config = transformers.LlamaConfig(**{**SIZES, **HEADS, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = transformers.LlamaForCausalLM(config)
        for tensor in model.parameters():
            torch.nn.init.normal_(tensor, mean=float(tensor.ndim == 1), std=0.2)
    model.save_pretrained(out)
    return out


def reload(path):
    """A saved causal model in float32, with nothing missing or left over."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert {key: value for key, value in info.items() if value} == {}
    return model.eval()


@pytest.fixture(scope="session")
def halves(opened, write):
    """A structure's half in width, the symmetric model that it becomes, and both again."""
    made = {}

    def get(name, pairs="stacked"):
        if (name, pairs) not in made:
            like = opened(name)
            small = write(coalesce(like, depth=False, pairs=pairs))
            large = write(decoalesce(open_checkpoint(small), like, pairs=pairs))
            again = write(coalesce(open_checkpoint(large), depth=False, pairs=pairs))
            back = write(decoalesce(open_checkpoint(again), like, pairs=pairs))
            made[name, pairs] = small, large, again, back
        return made[name, pairs]

    return get


@pytest.mark.parametrize("name", WIDE)
def test_decoalesced_in_width_computes_the_same_function(name, halves):
    small, large, *_ = halves(name)
    (a, one), (b, two) = load(name, small), load(name, large)
    assert {k: v for info in (one, two) for k, v in info.items() if v} == {}
    assert float((logits(a) - logits(b)).abs().max()) <= 1e-5


@pytest.mark.parametrize("name", WIDE)
def test_decoalesce_after_coalesce_of_a_symmetric_model_is_the_identity(name, halves):
    _, large, _, back = halves(name)
    before, after = stored(large), stored(back)
    assert before.keys() == after.keys()
    assert [n for n in before if float((before[n] - after[n]).abs().max()) > 1e-6] == []


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gpt2", "qwen3_moe"])
def test_coalesce_after_decoalesce_is_the_identity(name, halves):
    small, _, again, _ = halves(name, "adjacent")
    before, after = stored(small), stored(again)
    assert [n for n in before if float((before[n] - after[n]).abs().max()) > 1e-6] == []


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3", "gpt2"])
def test_decode_with_a_cache_is_decode_without(name, halves):
    model, _ = load(name, halves(name)[0])
    with_cache = generated(model)
    model.generation_config.use_cache = False
    assert with_cache == generated(model)


def reference_pairs(count, pairs):
    half = count // 2
    stacked = [(i, i + half) for i in range(half)]
    return stacked if pairs == "stacked" else [(2 * i, 2 * i + 1) for i in range(half)]


def reference_mean(count, pairs, width=1):
    """F: [count / 2, count], each row the mean of two, over units of `width` indices."""
    made = np.zeros((count // 2, count))
    for row, both in enumerate(reference_pairs(count, pairs)):
        made[row, list(both)] = 0.5
    return np.kron(made, np.eye(width))


@pytest.mark.parametrize("pairs", ["stacked", "adjacent"])
def test_matrices_are_the_papers(tmp_path, write, pairs):
    """W' = F_out W F_in, F_in adding what F averages: in numpy, in float64, heads whole."""
    path = llama(tmp_path / "m")
    old = {k: v.double().numpy() for k, v in stored(path).items()}
    new = stored(write(coalesce(open_checkpoint(path), depth=False, pairs=pairs)))
    hidden, inner = reference_mean(32, pairs), reference_mean(48, pairs)
    keys = reference_mean(2, pairs, 8)
    groups = np.kron(np.full((1, 2), 0.5), np.eye(16))  # two key heads, each with its two queries
    down = 2 * hidden.T
    p = "model.layers.1."
    wanted = {
        "model.embed_tokens.weight": old["model.embed_tokens.weight"] @ hidden.T,
        "lm_head.weight": old["lm_head.weight"] @ down,
        "model.norm.weight": hidden @ old["model.norm.weight"],
        p + "self_attn.q_proj.weight": groups @ old[p + "self_attn.q_proj.weight"] @ down,
        p + "self_attn.k_proj.weight": keys @ old[p + "self_attn.k_proj.weight"] @ down,
        p + "self_attn.o_proj.weight": (
            hidden @ old[p + "self_attn.o_proj.weight"] @ (2 * groups.T)
        ),
        p + "mlp.up_proj.weight": inner @ old[p + "mlp.up_proj.weight"] @ down,
        p + "mlp.down_proj.weight": hidden @ old[p + "mlp.down_proj.weight"] @ (2 * inner.T),
    }
    for name, value in wanted.items():
        np.testing.assert_allclose(new[name].numpy(), value, rtol=0, atol=1e-6, err_msg=name)


def test_depth_is_the_mean_of_neighbours_and_comes_back_twice(tmp_path, write):
    path = llama(tmp_path / "m")
    small = write(coalesce(open_checkpoint(path), width=False))
    large = write(decoalesce(open_checkpoint(small), open_checkpoint(path)))
    old, new, back = stored(path), stored(small), stored(large)
    assert reload(small).config.num_hidden_layers == 2
    assert reload(large).config.num_hidden_layers == 4
    for rest in ("mlp.up_proj.weight", "input_layernorm.weight"):
        mean = (old[f"model.layers.2.{rest}"] + old[f"model.layers.3.{rest}"]) / 2
        assert torch.allclose(new[f"model.layers.1.{rest}"], mean, atol=1e-7)
        for layer in (2, 3):
            assert torch.equal(back[f"model.layers.{layer}.{rest}"], new[f"model.layers.1.{rest}"])


def test_stacked_layers_keep_an_alternation_of_windows(opened, write):
    base = opened("gemma3_text")
    with pytest.raises(PlanError, match="layers 0 and 1 of two kinds"):
        coalesce(base)
    small = write(coalesce(base, layer_pairs="stacked"))
    assert json.loads((small / "config.json").read_text())["layer_types"] == [
        "sliding_attention",
        "full_attention",
    ]
    assert load("gemma3_text", small)[1]["missing_keys"] in ([], set())


@pytest.mark.parametrize(("queries", "keys"), [(4, 1), (6, 3), (4, 4), (8, 2)])
def test_heads_are_paired_whole_with_their_group_or_inside_it(tmp_path, write, queries, keys):
    sizes = {"num_attention_heads": queries, "num_key_value_heads": keys, "hidden_size": 48}
    path = llama(tmp_path / "m", head_dim=8, **sizes)
    small = write(coalesce(open_checkpoint(path), depth=False))
    large = write(decoalesce(open_checkpoint(small), open_checkpoint(path)))
    one, two = reload(small), reload(large)
    assert one.config.num_attention_heads == queries // 2
    assert one.config.num_key_value_heads == (keys // 2 if keys % 2 == 0 else keys)
    assert one.config.head_dim == 8
    assert float((logits(one) - logits(two)).abs().max()) <= 1e-5


def test_interpolate_is_between_the_two(tmp_path, write):
    path = llama(tmp_path / "m")
    small = write(coalesce(open_checkpoint(path)))
    back = write(decoalesce(open_checkpoint(small), open_checkpoint(path)))
    mixed = write(interpolate(open_checkpoint(path), open_checkpoint(back), alpha=0.25))
    old, new, found = stored(path), stored(back), stored(mixed)
    for name, tensor in found.items():
        wanted = 0.75 * old[name].double() + 0.25 * new[name].double()
        assert torch.allclose(tensor.double(), wanted, atol=1e-6)
    ends = [
        write(interpolate(open_checkpoint(path), open_checkpoint(back), alpha=a)) for a in (0, 1)
    ]
    assert all(torch.equal(t, old[n]) for n, t in stored(ends[0]).items())
    assert all(torch.equal(t, new[n]) for n, t in stored(ends[1]).items())


def test_trained_small_model_in_another_dtype_comes_back_in_the_parents(tmp_path, write):
    path = llama(tmp_path / "m")
    small = write(coalesce(open_checkpoint(path)))
    file = small / "model.safetensors"
    half = {k: v.bfloat16() for k, v in load_file(file).items()}
    moved = tmp_path / "trained"
    shutil.copytree(small, moved)
    save_file(half, moved / "model.safetensors", metadata={"format": "pt"})
    back = stored(write(decoalesce(open_checkpoint(moved), open_checkpoint(path))))
    assert {tensor.dtype for tensor in back.values()} == {torch.float32}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_layouts_are_refused(name, opened):
    with pytest.raises(PlanError):
        coalesce(opened(name), depth=False)


ODD = {
    "heads": ({"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 48}, "heads"),
    "ffn": ({"intermediate_size": 47}, "47 feed-forward units"),
    "layers": ({"num_hidden_layers": 3}, "3 layer"),
    "one layer": ({"num_hidden_layers": 1}, "1 layer"),
}


@pytest.mark.parametrize("case", ODD)
def test_what_does_not_come_in_pairs_is_refused(case, tmp_path):
    changes, told = ODD[case]
    with pytest.raises(RecipeError, match=told):
        coalesce(open_checkpoint(llama(tmp_path / "m", **changes)))


def test_nothing_to_do_is_refused(opened):
    with pytest.raises(RecipeError, match="nothing to do"):
        coalesce(opened("llama"), width=False, depth=False)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_outside_is_refused(opened, alpha):
    with pytest.raises(RecipeError, match="outside 0 to 1"):
        interpolate(opened("llama"), opened("llama"), alpha=alpha)


@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": 6}, {"vocab_size": 300}, {"intermediate_size": 64}, {"hidden_size": 64}],
)
def test_a_wrong_like_is_refused(changes, tmp_path, write):
    small = write(coalesce(open_checkpoint(llama(tmp_path / "m"))))
    other = llama(tmp_path / "other", head_dim=8, **changes)
    with pytest.raises(RecipeError, match="--like"):
        decoalesce(open_checkpoint(small), open_checkpoint(other))


def test_another_family_is_refused(opened):
    with pytest.raises(RecipeError, match="--like"):
        decoalesce(opened("llama"), opened("mistral"))


def test_other_sizes_do_not_interpolate(opened, tmp_path):
    other = open_checkpoint(llama(tmp_path / "m", intermediate_size=64))
    with pytest.raises(RecipeError, match="shape"):
        interpolate(opened("llama"), other)


def test_the_worked_v_cycle_runs_as_a_pipeline(fixtures_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(fixtures_dir.parent)
    out = tmp_path / "cycle"
    assert main(["run", "fixtures/vcycle.yml", "-o", str(out), "--json"]) == 0
    made = {step["step"]: step["state"] for step in json.loads(capsys.readouterr().out)["steps"]}
    assert made == {"small": "made", "back": "made", "mixed": "made", "check": "measured"}
    base, mixed = reload(fixtures_dir / "base"), reload(out / "mixed")
    assert reload(out / "small").config.hidden_size == base.config.hidden_size // 2
    assert base.config.to_diff_dict() == mixed.config.to_diff_dict()
    assert main(["run", "fixtures/vcycle.yml", "-o", str(out), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["steps"]
    assert {step["state"] for step in again} == {"skipped"}


def test_planning_a_refusal_imports_no_torch(tmp_path):
    path = llama(tmp_path / "m", num_hidden_layers=3)
    code = (
        "import sys; from cli.main import main; "
        f"code = main(['coalesce', {str(path)!r}, '-o', 'x']); "
        "assert code == 2, code; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


def test_records_are_reproduced(tmp_path, capsys):
    path = build("llama", tmp_path / "m")
    for words in (
        ["coalesce", str(path), "-o", str(tmp_path / "s"), "--pairs", "adjacent"],
        ["decoalesce", str(tmp_path / "s"), "--like", str(path), "-o", str(tmp_path / "d")],
        ["interpolate", str(path), str(tmp_path / "d"), "-o", str(tmp_path / "i")],
        ["reproduce", str(tmp_path / "s")],
        ["reproduce", str(tmp_path / "d")],
        ["reproduce", str(tmp_path / "i")],
    ):
        assert main(words) == 0, capsys.readouterr().err


def test_a_model_is_not_given_the_sizes_that_it_has(opened):
    with pytest.raises(RecipeError, match="nothing would change"):
        decoalesce(opened("llama"), opened("llama"))
