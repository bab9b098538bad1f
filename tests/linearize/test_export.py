"""Exported models are the same function in the classes of others, or are refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from surgery.checkpoint import open_checkpoint
from surgery.errors import SurgeryError
from surgery.linearize.convert import linearize
from surgery.linearize.export import export
from surgery.models.modeling_linearized import LinearizedForCausalLM
from surgery.run import run

CLOSE = 1e-4  # of logits in float32
ALL = None


@pytest.fixture(scope="module")
def linear(structure, tmp_path_factory):
    """A linearized directory by structure, method and layers kept, its new parameters moved."""
    made = {}

    def get(name, method, keep=ALL):
        key = name, method, keep
        if key not in made:
            out = tmp_path_factory.mktemp("linear") / "out"
            base = open_checkpoint(structure(name))
            run(linearize(base, method=method, keep_softmax=keep, sliding="convert"), out)
            made[key] = shaken(out)
        return made[key]

    return get


def shaken(path):
    torch.manual_seed(0)
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if ".mixer." in name:
            tensor.add_(torch.randn_like(tensor) * 0.3)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def edited(path, out, **changes):
    """A copy with other entries in the stock section of its config."""
    shutil.copytree(path, out)
    config = json.loads((out / "config.json").read_text())
    config["text_config"] |= changes
    (out / "config.json").write_text(json.dumps(config))
    return out


def exported(path, out, to):
    return run(export(open_checkpoint(path), to=to), out).out


def ours(path):
    return LinearizedForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def tokens(t=90, rows=2):
    return torch.randint(3, 256, (rows, t), generator=torch.Generator().manual_seed(t))


@pytest.mark.parametrize("keep", ["1", "0,1"])
@torch.no_grad()
def test_qwen3_next_computes_the_same(linear, tmp_path, keep):
    path = linear("qwen3", "gated-delta", keep)
    out = exported(path, tmp_path / "out", "qwen3-next")
    model, info = transformers.Qwen3NextForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    ids, mask = tokens(), torch.ones(2, 90, dtype=torch.long)
    mask[0, :7] = 0
    # Their layer keeps what padding was embedded as out of its state, and so does ours.
    first = ours(path)(ids, attention_mask=mask).logits
    found = model.eval()(ids, attention_mask=mask).logits
    assert (first - found)[mask.bool()].abs().max() < CLOSE


@torch.no_grad()
def test_qwen3_next_generates_the_same(linear, tmp_path):
    path = linear("qwen3", "gated-delta", "1")
    out = exported(path, tmp_path / "out", "qwen3-next")
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    asked = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones(2, 9)}
    found = [m.generate(tokens(9), **asked) for m in (ours(path), model)]
    assert torch.equal(*found)


def test_no_file_of_ours_goes_along(linear, tmp_path):
    out = exported(linear("qwen3", "gated-delta", "1"), tmp_path / "out", "qwen3-next")
    assert not list(out.glob("*.py"))
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert (out / "tokenizer.json").exists()


def test_norms_are_stored_so_that_nothing_is_lost(structure, tmp_path):
    base = shutil.copytree(structure("qwen3"), tmp_path / "base")
    tensors = {n: t.bfloat16() for n, t in load_file(base / "model.safetensors").items()}
    name = "model.layers.1.input_layernorm.weight"
    tensors[name][:4] = torch.tensor([0.001, 0.3, 3.25, -0.7])
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    plan = linearize(
        open_checkpoint(base), method="gated-delta", keep_softmax="1", sliding="convert"
    )
    path = run(plan, tmp_path / "linear").out
    out = exported(path, tmp_path / "out", "qwen3-next")
    stored = load_file(out / "model.safetensors")
    assert stored[name].dtype == torch.float32
    torch.testing.assert_close(1 + stored[name], tensors[name].float(), atol=6e-8, rtol=0)
    assert stored["model.layers.0.linear_attn.conv1d.weight"].dtype == torch.bfloat16


# Names, and shapes for the base's width 32, 4 heads of 8, 2 KV heads, one layer; read in 0.6.0.
def fla_layer(config):
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    wide, narrow = (round(hidden * config["expand_k"]), 0)
    narrow = wide // config["num_heads"] * config["num_kv_heads"]
    return {
        "attn_norm.weight": (hidden,),
        "mlp_norm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "attn.q_proj.weight": (wide, hidden),
        "attn.k_proj.weight": (narrow, hidden),
        "attn.v_proj.weight": (narrow, hidden),
        "attn.g_proj.weight": (wide, hidden),
        "attn.gk_proj.0.weight": (16, hidden),
        "attn.gk_proj.1.weight": (narrow, 16),
        "attn.gk_proj.1.bias": (narrow,),
        "attn.g_norm_swish_gate.weight": (wide // config["num_heads"],),
        "attn.o_proj.weight": (hidden, wide),
    }


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_fla_finds_the_names_and_shapes_that_it_builds(linear, tmp_path, name):
    out = exported(linear(name, "gla"), tmp_path / "out", "fla")
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("gla", ["GLAForCausalLM"])
    stored = {n: tuple(t.shape) for n, t in load_file(out / "model.safetensors").items()}
    size = (config["vocab_size"], config["hidden_size"])
    wanted = {"model.embeddings.weight": size, "model.norm.weight": size[1:]}
    if not config["tie_word_embeddings"]:
        wanted["lm_head.weight"] = size
    for layer in range(config["num_hidden_layers"]):
        wanted |= {f"model.layers.{layer}.{n}": s for n, s in fla_layer(config).items()}
    assert stored == wanted


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "qwen3"])
@torch.no_grad()
def test_fla_computes_the_same(linear, tmp_path, name):
    fla = pytest.importorskip("fla.models")
    path = linear(name, "gla")
    out = exported(path, tmp_path / "out", "fla")
    model = fla.GLAForCausalLM.from_pretrained(out, dtype=torch.float32).cuda().eval()
    found = model(tokens().cuda()).logits.cpu()
    assert (found - ours(path)(tokens()).logits).abs().max() < 1e-2  # their kernels take TF32


REFUSED = {
    "not linearized": ("qwen3", "", ALL, "fla", {}, "is no linearized model"),
    "another method": ("llama", "gla", ALL, "qwen3-next", {}, "computes gated-delta alone"),
    "windows": ("llama", "lolcats", ALL, "fla", {}, "computes gla alone"),
    "softmax kept for fla": ("llama", "gla", "1", "fla", {}, "softmax attention in layer 1"),
    "no norms of heads": ("llama", "gated-delta", "1", "qwen3-next", {}, "is of llama"),
    "no softmax kept": ("qwen3", "gated-delta", ALL, "qwen3-next", {}, "in no layer"),
    "a layer that slides": ("qwen3", "gated-delta", "2", "qwen3-next", {}, "layer 2: attends with"),
    "biases": ("qwen2", "gla", ALL, "fla", {}, "has the bias"),
    "other norms": ("gemma3_text", "gla", ALL, "fla", {}, "architecture gemma3_text"),
    "norms behind": ("olmo2", "gated-delta", ALL, "qwen3-next", {}, "architecture olmo2"),
    "experts": ("mixtral", "gla", ALL, "fla", {}, "architecture mixtral"),
    "an activation": ("llama", "gla", ALL, "fla", {"hidden_act": "gelu"}, "by gelu"),
    "no epsilon": ("llama", "gla", ALL, "fla", {"rms_norm_eps": None}, "rms_norm_eps"),
    "no rotation told": (
        *("qwen3", "gated-delta", "1", "qwen3-next"),
        {"rope_parameters": None},
        "rope_theta",
    ),
    "no such layout": ("llama", "gla", ALL, "mamba", {}, "is no layout"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_expressed_is_refused(linear, structure, tmp_path, case):
    name, method, keep, to, changes, said = REFUSED[case]
    path = linear(name, method, keep) if method else structure(name)
    if changes:
        path = edited(path, tmp_path / "edited", **changes)
    with pytest.raises(SurgeryError, match=said):
        export(open_checkpoint(path), to=to)


def test_a_parameter_that_is_missing_is_named(linear, tmp_path):
    path = shutil.copytree(linear("qwen3", "gated-delta", "1"), tmp_path / "copy")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.2.self_attn.mixer.A_log"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SurgeryError, match=r"layers\.2\.self_attn\.mixer\.A_log"):
        export(open_checkpoint(path), to="qwen3-next")


def test_the_command_writes_it_and_the_record_repeats_it(linear, tmp_path, capsys):
    from cli.main import main

    out = tmp_path / "out"
    path = linear("qwen3", "gated-delta", "1")
    assert main(["export", str(path), "--to", "qwen3-next", "-o", str(out), "--json"]) == 0
    assert main(["reproduce", str(out)]) == 0
    assert main(["verify", str(out)]) == 0
    capsys.readouterr()
    assert main(["export", str(path), "--to", "fla", "-o", str(tmp_path / "no")]) == 1
    assert "computes gla alone" in capsys.readouterr().err
