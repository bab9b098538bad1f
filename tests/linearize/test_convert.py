"""Converted models before training: what is in them, what is refused, and going back."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from surgery.checkpoint import open_checkpoint
from surgery.errors import SurgeryError
from surgery.linearize.config import modelling_files, stock_config
from surgery.linearize.convert import linearize
from surgery.linearize.initial import first_value
from surgery.linearize.keep import kept_layers
from surgery.linearize.methods import METHODS, full_spec
from surgery.linearize.parameters import Sizes
from surgery.models.linear_gated import GATED
from surgery.models.linear_mixers import MIXERS
from surgery.models.linear_seen import Past, Seen, Shape
from surgery.run import run

SUPPORTED = ("llama", "llama_bias", "mistral", "qwen2", "qwen3", "gemma3_text", "olmo2")
MIXTURES = ("mixtral", "qwen3_moe")


@pytest.fixture(scope="module")
def converted(structure, tmp_path_factory):
    """A linearized directory by structure, method and options, written once."""
    made: dict[tuple, Path] = {}

    def get(name: str, method: str, **asked) -> Path:
        key = (name, method, *sorted(asked.items()))
        if key not in made:
            plan = linearize(open_checkpoint(structure(name)), method=method, **asked)
            made[key] = run(plan, tmp_path_factory.mktemp("linearized") / "out").out
        return made[key]

    return get


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()
    }


def _load(folder: Path, **options):
    from surgery.models.modeling_linearized import LinearizedForCausalLM

    return LinearizedForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )


# -- what is written ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SUPPORTED, *MIXTURES])
def test_every_tensor_of_the_base_is_carried(name, structure, converted):
    old, new = _tensors(structure(name)), _tensors(converted(name, "lolcats", sliding="convert"))
    assert all(torch.equal(tensor, new[key]) for key, tensor in old.items())
    assert all(".self_attn.mixer." in key for key in new.keys() - old.keys())


@pytest.mark.parametrize("name", [*SUPPORTED, *MIXTURES])
def test_transformers_finds_nothing_missing_or_left_over(name, converted):
    _, info = _load(converted(name, "lizard", sliding="convert"))
    assert not any(info.values())


SIZES = Sizes(hidden=48, heads=6, kv_heads=2, head_dim=16)


def _mixer(method: str):
    """A method, its spec and its mixer, as it begins."""
    rule = METHODS[method]
    spec = full_spec(rule, {}, SIZES)
    mixer = {**MIXERS, **GATED}[method](spec, Shape(**asdict(SIZES), scale=0.25))
    with torch.no_grad():
        mixer.reset()
    return rule, spec, mixer


@pytest.mark.parametrize("method", METHODS)
def test_new_parameters_are_those_of_the_mixer(method):
    rule, spec, mixer = _mixer(method)
    told = rule.new(spec, SIZES)
    own = dict(mixer.named_parameters())
    assert {name: new.shape for name, new in told.items()} == {
        name: tuple(p.shape) for name, p in own.items()
    }
    assert not list(mixer.buffers())
    for name, new in told.items():
        begun = first_value(new.start, new.shape, seed=f"0 {name}").float()
        if new.start.drawn:
            assert begun.std().item() == pytest.approx(own[name].std().item(), rel=0.3)
        else:
            assert torch.equal(begun, own[name].detach().float()), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_state_are_those_that_are_kept(method, dtype):
    rule, spec, mixer = _mixer(method)
    past, rows, tokens = Past(), 3, 200
    with torch.no_grad():
        x = torch.randn(rows, tokens, 48, dtype=dtype)
        q = torch.randn(rows, 2, 3, tokens, 16, dtype=dtype)
        k, v = torch.randn(2, rows, 2, 1, tokens, 16, dtype=dtype)
        mixer.to(dtype)(Seen(x=x, q=q, k=k, v=v, q_rope=q, k_rope=k, docs=None), past)
    held = sum(t.numel() * t.element_size() for t in past.tensors.values())
    assert rule.kept(spec, SIZES).nbytes(SIZES, dtype.itemsize) * rows == held


def test_the_record_tells_what_trains_and_what_is_kept(converted):
    facts = json.loads(
        (converted("llama", "gla", keep_softmax="every:4") / "surgery.json").read_text()
    )["facts"]
    assert facts["linear_layers"] == [0, 1, 2]
    assert "model.layers.2.self_attn.mixer.*" in facts["trainable_parameters"]
    assert "model.layers.2.self_attn.q_proj.*" in facts["trainable_parameters"]
    assert not any("layers.3." in pattern for pattern in facts["trainable_parameters"])
    assert facts["kv_bytes_per_token"] == 3 * 2 * 2 * 8 * 4
    assert facts["break_even"] == -(-facts["state_bytes"] // facts["kv_bytes_per_token"])


def test_the_code_that_is_carried_is_all_that_it_imports(converted):
    folder = converted("llama", "lolcats")
    carried = {path.name: path.read_bytes() for path in folder.glob("*.py")}
    assert carried == modelling_files()
    assert {"modeling_linearized.py", "linear_core.py", "linear_seen.py"} <= carried.keys()


@pytest.mark.parametrize("name", modelling_files())
def test_a_file_of_another_format_is_refused(name, converted, tmp_path):
    from surgery.models.own_code import own_classes

    folder = shutil.copytree(converted("llama", "lolcats"), tmp_path / "old")
    file = folder / name
    file.write_text(file.read_text().replace("FORMAT = 1", "FORMAT = 0"))
    with pytest.raises(SurgeryError, match=f"{name}: is not of the installed version's format"):
        own_classes(folder, json.loads((folder / "config.json").read_text()))


def test_the_stock_config_comes_back(structure, converted):
    old = json.loads((structure("qwen3") / "config.json").read_text())
    new = json.loads((converted("qwen3", "liger", sliding="convert") / "config.json").read_text())
    assert stock_config(new) == old


def test_stock_classes_refuse_it(converted):
    from transformers import LlamaForCausalLM

    with pytest.raises((ValueError, TypeError)):
        LlamaForCausalLM.from_pretrained(converted("llama", "lolcats"))


# -- which layers ---------------------------------------------------------------------------

KEEPS = {
    None: (),
    "every:4": (3, 7, 11),
    "every:1": "keeps every layer",
    "every:0": "is no distance between layers",
    "every:13": "keeps no layer of 12",
    "3,7,11": (3, 7, 11),
    "11,0-3": (0, 1, 2, 3, 11),
    (2, 5): (2, 5),
    "0-11": "keeps every layer, which leaves nothing to convert",
    "12": "names layer 12, and the last of 12 layers is 11",
    "3-900000": "names layer 12",
    "3,3": "names layer 3 twice",
    "3-1": "is no layer and no range",
    "last": "is no layer and no range",
    "": "is no layer and no range",
    "kl:8": "is measured on a model after the transfer stage",
    (1.5,): "is no number",
}


@pytest.mark.parametrize("keep", KEEPS)
def test_kept_layers(keep):
    expected = KEEPS[keep]
    if isinstance(expected, str):
        with pytest.raises(SurgeryError, match=expected):
            kept_layers(keep, 12)
    else:
        assert kept_layers(keep, 12) == expected


SLIDES = (
    ("gemma3_text", "keep", None, [1, 3], 64),
    ("gemma3_text", "convert", None, [0, 1, 2, 3], 8),
    ("gemma3_text", "keep", "3", [1], 64),
    ("qwen3", "keep", None, [0, 1], 64),
    ("mistral", "keep", None, [0, 1, 2, 3], 8),
    ("mistral", "convert", "0", [1, 2, 3], 8),
    ("llama", "keep", None, [0, 1, 2, 3], 64),
)


@pytest.mark.parametrize("case", SLIDES)
def test_layers_that_slide(case, structure):
    name, sliding, keep, linear, window = case
    base = open_checkpoint(structure(name))
    plan = linearize(base, method="lolcats", sliding=sliding, keep_softmax=keep)
    assert plan.config["linear_layers"] == linear
    assert plan.config["mixer"]["window"] == window


# -- layers turned back ---------------------------------------------------------------------


def test_a_layer_gets_softmax_back(structure, converted):
    first = converted("llama", "lolcats")
    plan = linearize(open_checkpoint(first), method="lolcats", keep_softmax="2")
    assert (
        plan.config
        == linearize(open_checkpoint(structure("llama")), method="lolcats", keep_softmax="2").config
    )
    names = plan.outputs
    assert not any("layers.2.self_attn.mixer" in name for name in names)
    assert any("layers.1.self_attn.mixer" in name for name in names)


def test_projections_come_back_from_the_original(structure, converted, tmp_path):
    trained = shutil.copytree(converted("llama", "gla"), tmp_path / "trained")
    _shake(trained)
    plan = linearize(
        open_checkpoint(trained),
        open_checkpoint(structure("llama")),
        method="gla",
        keep_softmax=[2],
    )
    new = _tensors(run(plan, tmp_path / "out").out)
    base, moved = _tensors(structure("llama")), _tensors(trained)
    for layer, source in ((2, base), (1, moved)):
        name = f"model.layers.{layer}.self_attn.k_proj.weight"
        assert torch.equal(new[name], source[name])
    assert not torch.equal(base[name], moved[name])


def _shake(folder: Path) -> None:
    from safetensors.torch import save_file

    for file in folder.glob("*.safetensors"):
        save_file({k: t + 1 for k, t in load_file(file).items()}, file)


AGAIN = {
    "method": ({"method": "liger", "keep_softmax": "1"}, "is not the method"),
    "option": ({"method": "gla", "keep_softmax": "1", "window": 8}, "is nothing that"),
    "nothing": ({"method": "gla", "keep_softmax": None}, "takes out no mixer"),
    "no original": ({"method": "gla", "keep_softmax": "1"}, "trained its projections"),
}


@pytest.mark.parametrize("case", AGAIN)
def test_wrong_changes_of_a_linearized_model_are_refused(case, converted):
    asked, why = AGAIN[case]
    with pytest.raises(SurgeryError, match=why):
        linearize(open_checkpoint(converted("llama", "gla")), **asked)


def test_another_model_is_no_original(structure, converted):
    base = open_checkpoint(converted("llama", "gla"))
    with pytest.raises(SurgeryError, match="name the model that"):
        linearize(base, open_checkpoint(structure("qwen3")), method="gla", keep_softmax="1")


# -- refusals -------------------------------------------------------------------------------

REFUSED = {
    "deepseek_v3": r"layer 0: compresses keys and values into a latent \(MLA\)",
    "gpt2": "layer 0: stores queries, keys and values as one projection",
    "gpt_neox": "layer 0: stores queries, keys and values as one projection",
    "falcon": "layer 0: stores queries, keys and values as one projection",
    "phi3": "layer 0: stores queries, keys and values as one projection",
    "gpt_oss": "layer 0: has attention sinks of its own",
    "qwen3_next": "layer 0: is linear already",
    "gemma2": "layer 0: caps its scores at 50.0",
    "smollm3": "layer 2: has no rotary embedding",
    "cohere2": "layer 3: has no rotary embedding",
    "bert": "is no causal language model",
    "gemma3": "towers",
    "llava": "towers",
    "starcoder2": "is of the architecture starcoder2",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_architectures_are_refused(name, structure):
    with pytest.raises(SurgeryError, match=REFUSED[name]) as caught:
        linearize(open_checkpoint(structure(name)), method="lolcats")
    assert str(caught.value).count("\n") == 0


def test_every_structure_is_converted_or_refused():
    from architectures import ARCHITECTURES

    known = {*SUPPORTED, *MIXTURES, *REFUSED, "llama_tied", "qwen2_vl"}
    assert known == {*ARCHITECTURES}


MODELS = {
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, "is quantised"),
    "encoder-decoder": ({"is_encoder_decoder": True}, "is no causal language model"),
    "its own code": ({"auto_map": {"AutoConfig": "x.Y"}}, "has code of its own"),
    "recursive": ({"model_type": "recursive"}, "is recursive"),
    "factored": ({"model_type": "factored"}, "is factored"),
    "both ways": ({"use_bidirectional_attention": True}, "layer 0: attends to what follows"),
    "another config": ({"num_attention_heads": 2}, "layer 0: has q_proj of the shape"),
}


@pytest.mark.parametrize("case", MODELS)
def test_other_models_are_refused(case, structure, tmp_path):
    entries, why = MODELS[case]
    folder = shutil.copytree(structure("llama"), tmp_path / "other")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    with pytest.raises(SurgeryError, match=why):
        linearize(open_checkpoint(folder), method="lolcats")


ASKS = {
    "unknown": ({"method": "mamba"}, "is none of lolcats"),
    "window of none": (
        {"method": "hedgehog", "window": 8},
        "is nothing that --method hedgehog has",
    ),
    "sinks of none": ({"method": "liger", "sinks": 2}, "is nothing that --method liger has"),
    "map of one": ({"method": "t2r", "feature_map": "exp"}, "is nothing that --method t2r has"),
    "no such map": ({"method": "lolcats", "feature_map": "taylor"}, "is no feature map of"),
    "window 0": ({"method": "lolcats", "window": 0}, "is too small"),
    "all sinks": ({"method": "swa-sink", "window": 4, "sinks": 4}, "leaves no room"),
    "sliding": ({"method": "lolcats", "sliding": "drop"}, "is none of keep, convert"),
    "kl": ({"method": "lolcats", "keep_softmax": "kl:1"}, "is measured"),
}


@pytest.mark.parametrize("case", ASKS)
def test_wrong_asks_are_refused(case, structure):
    asked, why = ASKS[case]
    with pytest.raises(SurgeryError, match=why):
        linearize(open_checkpoint(structure("llama")), **asked)


def test_a_second_model_has_no_business_at_first(structure):
    base = open_checkpoint(structure("llama"))
    with pytest.raises(SurgeryError, match="is a second model"):
        linearize(base, base, method="lolcats")
