"""Configs move with their layers: for every class in transformers that tells layers apart.

The judge is the class itself: a config.json as older checkpoints have it (without the list that
the class makes up) is carried over and read again, and each new layer must be told what the layer
that it came from was told.
"""

from __future__ import annotations

import json
import re

import pytest
from config_oracle import checkpoint, classes, count_key, facts, read

from growth.stack import stack
from surgery.errors import PlanError, SurgeryError

N = 12
ODD = [0, 1, 1, 2, 4, 3, 5, 6, 8, 7, 9, 10, 11, 11]
TWICE = [*range(N), *range(N)]
PRUNED = [0, 1, 2, 5, 6, 9, 11]

# Vision towers and other parts that are never the language model that is grown.
APART = re.compile(r"vision|audio|_dit$|^sapiens|assistant$|^bit$|^zamba2$")
# Refused whatever the config says, and why.
TIED_TO_DEPTH = {
    "beam": "adds a residual by its own number",
    "embedding_gemma2_text": "a slice for each layer",
    "gemma3n_text": "keys and values of earlier ones",
    "gemma4_text": "a slice for each layer",
    "inkling2_text": "outputs of earlier blocks",
    "minimax": "decays by the depth",
    "neomme": "depend on the depth",
    "zamba": "share blocks of weights",
}
# Refused until the list that the class makes up is written out.
UNLISTED = {
    "cohere2_moe", "deepseek_v4", "diffusion_gemma_text", "dots3_note_text", "flint",
    "gemma4_unified_text", "glm5_next_text", "hy_v4", "inkling_text", "kimi_linear", "lfm3",
    "mimo_v2_flash", "minimax_m3_vl_text", "mllama_text_model", "muse_glimmer_text",
    "muse_spark_text", "nemotron_h", "qwen4_exp_text", "step3p5", "t5_gemma_module",
    "t5gemma2_decoder", "t5gemma2_text", "ultrabert",
}  # fmt: skip
# The config has no entry that could say it: refused for a map that breaks the pattern.
UNSAYABLE = {
    "afmoe": {"twice"},
    "axk1": {"twice"},
    "jamba": {"odd", "twice", "pruned"},
    "lfm2_moe": {"twice"},
    "modernbert": {"twice"},
    "modernbert-decoder": {"twice"},
    "zaya": {"twice"},
}
MAPS = {"odd": ODD, "twice": TWICE, "pruned": PRUNED}

SWA = {"use_sliding_window": True, "sliding_window": 64}
LATE = SWA | {"max_window_layers": 5}
# Entries that change what the class makes up.
KEYED = [
    ("afmoe", {"global_attn_every_n_layers": 3, "num_dense_layers": 0}),
    ("axk1", {"first_k_dense_replace": 2, "moe_layer_freq": 1}),
    ("axk2", {"first_k_dense_replace": 3}),
    ("bailing_hybrid", {"layer_group_size": 4, "first_k_dense_replace": 3}),
    ("bamba", {"attn_layer_indices": [3, 7]}),
    ("cohere2", {"sliding_window_pattern": 3}),
    ("cohere2", {"sliding_window_pattern": 3, "layer_types": ["full_attention"] * N}),
    ("deepseek_v32", {"first_k_dense_replace": 4}),
    ("dots1", {"max_window_layers": 4}),
    ("dots1", {"max_window_layers": 4, "sliding_window": None}),
    ("exaone4", {"sliding_window_pattern": 3}),
    ("exaone_moe", {"sliding_window_pattern": 3, "first_k_dense_replace": 2}),
    ("gemma3_text", {"sliding_window_pattern": 5}),
    ("gpt_neo", {"num_layers": N, "attention_types": [[["global", "local"], 6]]}),
    ("gpt_neo", {"num_layers": N, "attention_types": [[["global"], 4], [["local"], 8]]}),
    ("granitemoehybrid", {"layer_types": ["mamba", "mamba", "attention", "mamba"] * 3}),
    ("kimi_linear", {"layer_types": ["linear_attention", "full_attention"] * 6}),
    ("lfm2", {"full_attn_idxs": [2, 5, 8]}),
    ("lfm2", {"layer_types": ["conv", "conv", "full_attention"] * 4}),
    ("llama4_text", {"interleave_moe_layer_step": 2}),
    ("llama4_text", {"no_rope_layer_interval": 3, "no_rope_layers": []}),
    ("llama4_text", {"moe_layers": [1, 5, 7]}),
    ("mllama_text_model", {"cross_attention_layers": [1, 4, 7]}),
    ("modernbert", {"global_attn_every_n_layers": 2}),
    ("modernbert-decoder", {"global_attn_every_n_layers": 4}),
    ("nemotron_h", {"hybrid_override_pattern": "M-M*EM-M*-ME"}),
    ("nemotron_h", {"layers_block_type": ["mamba", "moe", "attention", "mlp"] * 3}),
    ("qwen2", LATE),
    ("qwen2", LATE | {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": False, "max_window_layers": 5}),
    ("qwen2_moe", LATE),
    ("qwen2_5_vl_text", LATE),
    ("qwen2_5_omni_text", LATE),
    ("qwen2_vl_text", LATE),
    ("qwen3", LATE),
    ("qwen3", LATE | {"layer_types": ["full_attention", "sliding_attention"] * 6}),
    ("qwen3_5_text", {"full_attention_interval": 3}),
    ("qwen3_5_moe_text", {"full_attention_interval": 2}),
    ("qwen3_next", {"full_attention_interval": 3}),
    ("recurrent_gemma", {"block_types": ["recurrent", "attention"]}),
    ("smollm3", {"no_rope_layer_interval": 3}),
    ("smollm3", SWA | {"no_rope_layer_interval": 2}),
    ("smollm3", SWA | {"no_rope_layers": [1, 0, 0] * 4}),
    ("step3p5", {"layer_types": ["full_attention"] * N, "mlp_layer_types": ["dense"] * N}),
]


def described(family):
    """A class and the shortest config.json of twelve layers."""
    cls = classes().get(family)
    if cls is None:
        pytest.skip(f"this transformers has no {family}")
    return cls, {"model_type": family, count_key(cls()): N}


def carry(document, sources, **options):
    base = checkpoint(document, N, **options)
    return stack(base, layers=",".join(map(str, sources))).config


def check(cls, document, sources, folder):
    before, after = (read(cls, each, folder) for each in (document, carry(document, sources)))
    told = facts(before, N)
    assert facts(after, len(sources)) == [told[source] for source in sources]


def with_layers():
    """Families whose class can be made with twelve layers."""
    return [name for name in classes() if not APART.search(name) and count_key_of(name) is not None]


def count_key_of(name):
    try:
        return count_key(classes()[name]())
    except Exception:
        return None


@pytest.fixture(scope="module")
def families():
    return with_layers()


@pytest.mark.parametrize("how", MAPS)
def test_every_class_is_told_again_what_it_made_up(how, families, tmp_path):
    wrong, seen = [], 0
    for family in families:
        refusing = family in TIED_TO_DEPTH or family in UNLISTED
        if refusing or how in UNSAYABLE.get(family, ()) or family == "gpt_neo":
            continue
        seen += 1
        cls, document = described(family)
        try:
            check(cls, document, MAPS[how], tmp_path)
        except (AssertionError, SurgeryError, ValueError) as error:
            wrong.append(f"{family}: {str(error)[:200]}")
    assert wrong == []
    assert seen > 40


@pytest.mark.parametrize("how", MAPS)
@pytest.mark.parametrize(("family", "entries"), KEYED)
def test_entries_that_change_the_rule_are_followed(family, entries, how, tmp_path):
    if how in UNSAYABLE.get(family, ()):
        pytest.skip("refused for this map, which its own test checks")
    cls, document = described(family) if family != "gpt_neo" else (classes()[family], {})
    check(cls, {"model_type": family, **document, **entries}, MAPS[how], tmp_path)


@pytest.mark.parametrize("how", MAPS)
def test_configs_written_out_by_transformers_move_whole(how, families, tmp_path):
    wrong, seen = [], 0
    for family in families:
        kept_out = family in TIED_TO_DEPTH or family in {"gpt_neo", "nemotron_h"}
        if kept_out or how in UNSAYABLE.get(family, ()):
            continue
        cls, document = described(family)
        read(cls, document, tmp_path).save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        sources = MAPS[how]
        try:
            check(cls, written, sources, tmp_path)
            seen += 1
        except (AssertionError, SurgeryError, ValueError) as error:
            wrong.append((family, str(error)[:120]))
    assert wrong == []
    assert seen > 60


@pytest.mark.parametrize("family", TIED_TO_DEPTH)
def test_arithmetic_that_depends_on_depth_is_refused_with_the_reason(family):
    _, document = described(family)
    with pytest.raises(PlanError, match=TIED_TO_DEPTH[family]):
        carry(document, ODD)


@pytest.mark.parametrize("family", sorted(UNLISTED))
def test_lists_made_up_in_an_unknown_way_are_asked_for(family):
    _, document = described(family)
    with pytest.raises(PlanError, match=f"which {family} makes up by a rule") as refused:
        carry(document, ODD)
    assert "save_pretrained(BASE)" in str(refused.value)


@pytest.mark.parametrize("family", UNSAYABLE)
def test_what_the_config_cannot_say_is_refused(family):
    _, document = described(family)
    for how in UNSAYABLE[family]:
        with pytest.raises(PlanError):
            carry(document, MAPS[how])


@pytest.mark.parametrize("family", [*TIED_TO_DEPTH, *sorted(UNLISTED), *UNSAYABLE])
def test_the_identity_is_never_refused(family):
    _, document = described(family)
    assert carry(document, range(N)) == document


def test_a_text_config_without_model_type_is_known_by_its_parent():
    text = {"num_hidden_layers": N, "hidden_size": 64}
    after = carry({"model_type": "gemma3", "text_config": text}, ODD)
    kinds = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(N)]
    assert after["text_config"]["layer_types"] == [kinds[i] for i in ODD]


def test_a_flat_config_of_an_older_vision_model_is_followed(tmp_path):
    from transformers import Qwen2VLConfig

    flat = {"model_type": "qwen2_vl", "num_hidden_layers": N, "hidden_size": 64} | LATE
    before, after = (read(Qwen2VLConfig, c, tmp_path) for c in (flat, carry(flat, ODD)))
    told = facts(before.text_config, N)
    assert facts(after.text_config, len(ODD)) == [told[i] for i in ODD]


def test_windows_of_qwen3_stay_with_their_layers():
    """Made anew by rule, the last inserted layers would have other windows than their sources."""
    document = {"model_type": "qwen3", "num_hidden_layers": N} | LATE
    kinds = carry(document, TWICE)["layer_types"]
    assert kinds == (["full_attention"] * 5 + ["sliding_attention"] * 7) * 2
