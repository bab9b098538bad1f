"""Longer contexts: the frequencies after a reload are the formula's, weights are untouched."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from growth.context import context
from structures import load
from surgery.checkpoint import open_checkpoint
from surgery.errors import CheckpointError, PlanError, RecipeError

FACTOR, THETA = 4.0, 10000.0


def edited(path, folder, **changes):
    """A copy of a model with other config keys; None takes one out."""
    shutil.copytree(path, folder)
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in {**config, **changes}.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def extended(structure, write):
    made = {}

    def get(name, method, **options):
        key = (name, method, *options.items())
        if key not in made:
            base = open_checkpoint(structure(name))
            made[key] = write(context(base, factor=FACTOR, method=method, **options))
        return made[key]

    return get


def frequencies(model, kind=""):
    """The inverse frequencies of a loaded model, for full attention or what `kind` says."""
    names = [n for n, _ in model.named_buffers() if n.endswith(f"{kind}inv_freq")]
    text = [n for n in names if "vision" not in n and "visual" not in n and "original" not in n]
    return dict(model.named_buffers())[text[0]]


def plain(theta, dimensions):
    return [theta ** (-2 * i / dimensions) for i in range(dimensions // 2)]


def yarn(theta, d, original):
    """arXiv 2309.00071, equations 17 to 23, alpha 1 and beta 32."""
    base = plain(theta, d)
    at = [d * math.log(original / (r * 2 * math.pi)) / (2 * math.log(theta)) for r in (32, 1)]
    low, high = max(math.floor(at[0]), 0), min(math.ceil(at[1]), d - 1)
    high = high + 0.001 if low == high else high
    ramp = [min(max((i - low) / (high - low), 0), 1) for i in range(d // 2)]
    return [f / FACTOR * g + f * (1 - g) for f, g in zip(base, ramp, strict=True)]


# Family: dimensions of a head that are rotated.
SIZES = {"llama": 8, "qwen3": 16, "mistral": 8, "olmo2": 8, "mixtral": 8}
WANTED = {
    "linear": lambda theta, d: [f / FACTOR for f in plain(theta, d)],
    "ntk": lambda theta, d: plain(theta * FACTOR ** (d / (d - 2)), d),
    "dynamic": plain,
    "yarn": lambda theta, d: yarn(theta, d, 128),
}


@pytest.mark.parametrize("method", WANTED)
@pytest.mark.parametrize("name", SIZES)
def test_frequencies_after_a_reload_are_the_formulas(name, method, extended, structure):
    model, info = load(name, extended(name, method))
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    told = json.loads((structure(name) / "config.json").read_text())["rope_parameters"]
    wanted = torch.tensor(WANTED[method](told["rope_theta"], SIZES[name]))
    torch.testing.assert_close(frequencies(model), wanted, rtol=1e-5, atol=0)
    assert model.config.max_position_embeddings == (128 if method == "dynamic" else 512)


def test_weights_are_copied(extended, structure):
    one, two = (
        load_file(p / "model.safetensors") for p in (structure("llama"), extended("llama", "yarn"))
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def logits(name, path, length):
    model, _ = load(name, path)
    ids = torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
def test_dynamic_reads_short_texts_as_before_and_long_ones_otherwise(name, extended, structure):
    short, long = (
        [logits(name, p, length) for p in (structure(name), extended(name, "dynamic"))]
        for length in (100, 200)
    )
    assert torch.equal(*short)
    assert not torch.equal(*long)


def test_dynamic_beyond_the_original_length_is_the_formula(extended):
    model, _ = load("llama", extended("llama", "dynamic"))
    model(input_ids=torch.zeros(1, 256, dtype=torch.long))
    scale = (FACTOR * 256 / 128 - (FACTOR - 1)) ** (8 / 6)
    wanted = torch.tensor(plain(THETA * scale, 8))
    torch.testing.assert_close(frequencies(model), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", ["linear", "ntk", "yarn"])
def test_only_full_attention_is_scaled_where_sliding_layers_have_their_own(
    method, extended, structure
):
    (before, _), (after, _) = (
        load("gemma3_text", p) for p in (structure("gemma3_text"), extended("gemma3_text", method))
    )
    kinds = ("sliding_attention_", "full_attention_")
    one, two = ([frequencies(m, kind) for kind in kinds] for m in (before, after))
    assert torch.equal(one[0], two[0])
    assert not torch.equal(one[1], two[1])


@pytest.mark.parametrize("name", ["gemma3", "llava", "qwen2_vl"])
def test_the_section_of_the_language_model_is_changed(name, extended):
    path = extended(name, "linear")
    text = json.loads((path / "config.json").read_text())["text_config"]
    _, info = load(name, path)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert text["max_position_embeddings"] == 512
    told = text["rope_parameters"]
    assert (told.get("full_attention") or told)["factor"] == FACTOR


OLD = {"rope_parameters": None, "rope_theta": 50000.0, "rope_scaling": None}


@pytest.mark.parametrize("method", ["linear", "ntk", "dynamic", "yarn"])
def test_an_older_config_means_the_same(method, structure, tmp_path, write):
    """Both spellings load alike, and what the older keys say is what the newer ones say."""
    old = edited(structure("llama"), tmp_path / "old", **OLD)
    told = {"rope_theta": 50000.0, "rope_type": "default"}
    new = edited(structure("llama"), tmp_path / "new", rope_parameters=told)
    made = [write(context(open_checkpoint(p), factor=FACTOR, method=method)) for p in (old, new)]
    one, two = (frequencies(load("llama", p)[0]) for p in made)
    assert torch.equal(one, two)
    stripped = edited(made[0], tmp_path / "stripped", rope_parameters=None)
    assert torch.equal(frequencies(load("llama", stripped)[0]), one)


def test_an_older_gemma_3_config_keeps_its_two_bases(structure, tmp_path, write):
    changes = {"rope_parameters": None, "rope_theta": 3e5, "rope_local_base_freq": 2e4}
    old = edited(structure("gemma3_text"), tmp_path / "old", **changes)
    out = write(context(open_checkpoint(old), factor=FACTOR, method="linear"))
    model, _ = load("gemma3_text", out)
    near, far = (frequencies(model, f"{kind}_attention_") for kind in ("sliding", "full"))
    torch.testing.assert_close(near, torch.tensor(plain(2e4, 16)), rtol=1e-5, atol=0)
    wanted = torch.tensor([f / FACTOR for f in plain(3e5, 16)])
    torch.testing.assert_close(far, wanted, rtol=1e-5, atol=0)


def test_gpt_neox_rotates_a_part_of_each_head(structure, tmp_path, write):
    old = edited(
        structure("gpt_neox"), tmp_path / "old",
        rope_parameters=None, rotary_emb_base=20000, rotary_pct=0.5,
    )  # fmt: skip
    out = write(context(open_checkpoint(old), factor=FACTOR, method="ntk"))
    wanted = torch.tensor(plain(20000 * FACTOR ** (4 / 2), 4))
    torch.testing.assert_close(frequencies(load("gpt_neox", out)[0]), wanted, rtol=1e-5, atol=0)


WINDOWED = ["llama", "mixtral", "phi3", "starcoder2", "qwen3_moe", "qwen3", "qwen2"]


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_changes_nothing_inside_it_and_something_behind(name, structure, tmp_path, write):
    from transformers import AutoModelForCausalLM

    free = {"sliding_window": None, "use_sliding_window": None, "layer_types": None}
    base = edited(structure(name), tmp_path / "base", **free)
    plan = context(open_checkpoint(base), factor=FACTOR, method="lm-infinite", original_max=32)
    out = write(plan)
    both = [
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval() for p in (base, out)
    ]
    ids = torch.randint(0, 256, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, two = (model(input_ids=ids).logits for model in both)
    torch.testing.assert_close(one[:, :32], two[:, :32], rtol=0, atol=1e-5)
    assert (one[:, 40:] - two[:, 40:]).abs().max() > 1e-3
    assert both[1].config.max_position_embeddings == 128
    assert any("first tokens" in note for note in plan.notes)


def test_the_tokenizers_length_moves_with_the_models(fixtures_dir, write):
    out = write(context(open_checkpoint(fixtures_dir / "base"), factor=2, method="yarn"))
    assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == 256


def test_stored_frequencies_are_dropped(structure, tmp_path, write):
    base = edited(structure("llama"), tmp_path / "m")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    out = write(context(open_checkpoint(base), factor=2, method="linear"))
    assert not [n for n in load_file(out / "model.safetensors") if "inv_freq" in n]


def test_a_recorded_ask_gives_the_same_plan(structure):
    base = open_checkpoint(structure("llama"))
    plan = context(base, factor=2, method="ntk")
    again = context(base, **plan.parameters)
    assert again.config == plan.config


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"factor": 1.0, "method": "linear"}, "not above 1"),
        ({"factor": math.nan, "method": "linear"}, "not above 1"),
        ({"factor": math.inf, "method": "linear"}, "not above 1"),
        ({"factor": 2.0, "method": "alibi"}, "is none of linear"),
        ({"factor": 2.0, "method": "yarn", "original_max": 0}, "outside 1"),
        ({"factor": 1e30, "method": "yarn"}, "positions"),
    ],
)
def test_a_wrong_ask_is_one_sentence(options, told, structure):
    with pytest.raises(RecipeError, match=told) as caught:
        context(open_checkpoint(structure("llama")), **options)
    assert "\n" not in str(caught.value)


SCALED = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("name", "changes", "method", "told"),
    [
        ("gpt2", {}, "linear", "no rotary positions"),
        ("bert", {}, "linear", "no rotary positions"),
        ("falcon", {"alibi": True}, "linear", "ALiBi"),
        ("llama", {"rope_parameters": SCALED}, "linear", "already .rope_type yarn"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2}}, "ntk", "type linear"),
        ("llama", {"rope_parameters": {"main": {}}}, "linear", "the kinds main"),
        ("phi3", {}, "yarn", "reads yarn as longrope"),
        ("gpt_neox", {}, "ntk", "one frequency"),
        ("gemma2", {}, "lm-infinite", "no window for all layers"),
        ("llama_bias", {}, "lm-infinite", "no window for all layers"),
        ("mistral", {}, "lm-infinite", "a window of 8 already"),
        ("mistral", {"sliding_window": 4096}, "lm-infinite", "a window of 4096"),
    ],
)
def test_a_model_that_cannot_be_extended_is_refused(  # noqa: PLR0917 - a row of the table
    name, changes, method, told, structure, tmp_path
):
    base = edited(structure(name), tmp_path / "m", **changes)
    with pytest.raises(PlanError, match=told) as caught:
        context(open_checkpoint(base), factor=2, method=method)
    assert "\n" not in str(caught.value)


def test_a_file_without_config_is_refused(fixtures_dir):
    base = open_checkpoint(fixtures_dir / "base" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        context(base, factor=2, method="linear")


def test_a_config_without_a_length_is_asked_for_one(structure, tmp_path):
    base = edited(structure("llama"), tmp_path / "m", max_position_embeddings=None)
    with pytest.raises(RecipeError, match="--original-max"):
        context(open_checkpoint(base), factor=2, method="linear")
