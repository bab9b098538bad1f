"""`surgery inspect`: what is told of every kind of checkpoint, in every form."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from cli.main import main
from structures import LAYERS, STRUCTURES
from surgery.checkpoint import open_checkpoint
from surgery.survey import survey
from surgery.survey.layers import pattern, ranges

KEYS = {
    "ref", "name", "kind", "revision", "family", "architectures", "tensors", "parameters", "bytes",
    "active", "parts", "dtypes", "layers", "dimensions", "embedding", "head", "tied", "lost_head",
    "experts", "other_stacks", "quantization", "tokenizer", "files", "record", "notes",
}  # fmt: skip
LAYER_KEYS = {"count", "extra", "prefix", "pattern", "groups"}
GROUP_KEYS = {"kind", "layers", "count", "tensors", "parameters", "bytes"}
COUNT_KEYS = {"name", "tensors", "parameters", "bytes"}

PATTERNS = {
    "llama": "0-3 dense",
    "gemma3_text": "2 x (1 sliding_attention, 1 full_attention)",
    "gemma3": "2 x (1 sliding_attention, 1 full_attention)",
    "cohere2": "0-2 sliding_attention, 3 full_attention",
    "smollm3": "0-1 sliding_attention, 2 full_attention, 3 sliding_attention",
    "qwen2": "0-1 full_attention, 2-3 sliding_attention",
    "deepseek_v3": "0 dense, 1-3 experts",
    "qwen3_moe": "0 experts, 1 dense, 2-3 experts",
    "mixtral": "0-3 experts",
    "gpt_oss": "2 x (1 sliding_attention + experts, 1 full_attention + experts)",
    "qwen3_next": "2 x (1 linear_attention + experts, 1 full_attention + experts)",
}


def told(capsys, *arguments):
    """The JSON that a successful command prints."""
    capsys.readouterr()
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def tensors_of(prefix="model.layers", layers=2, width=4):
    rng = np.random.default_rng(0)
    made = {"model.embed_tokens.weight": rng.random((6, width), np.float32)}
    for n in range(layers):
        made[f"{prefix}.{n}.self_attn.q_proj.weight"] = rng.random((width, width), np.float32)
        made[f"{prefix}.{n}.mlp.up_proj.weight"] = rng.random((2, width), np.float32)
    return made


def make(directory, config=None, tensors=None, **files):
    directory.mkdir(exist_ok=True)
    save_file(tensors or tensors_of(), directory / "model.safetensors")
    plain = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 4, "vocab_size": 6}
    (directory / "config.json").write_text(json.dumps(plain | (config or {})))
    for name, content in files.items():
        path = directory / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structure_is_told_whole(name, structure, capsys):
    found = told(capsys, structure(name))
    with safe_open(structure(name) / "model.safetensors", "np") as file:
        shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
    assert found["parameters"] == sum(int(np.prod(shape)) for shape in shapes)
    assert found["tensors"] == len(shapes)
    assert found["layers"]["count"] == LAYERS
    assert found["notes"] == []


@pytest.mark.parametrize("name", STRUCTURES)
def test_parts_and_dtypes_add_up(name, structure, capsys):
    found = told(capsys, structure(name))
    for key in ("parts", "dtypes"):
        for unit in ("tensors", "parameters", "bytes"):
            assert sum(count[unit] for count in found[key]) == found[unit]
    groups = found["layers"]["groups"]
    assert sum(group["count"] for group in groups) == found["layers"]["count"]


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structure_prints(name, structure, capsys):
    assert main(["inspect", str(structure(name)), "--tensors"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("\n") > 20
    assert "model.safetensors" in shown


@pytest.mark.parametrize(("name", "expected"), PATTERNS.items())
def test_layers_are_told_by_kind_and_number(name, expected, structure):
    from growth.layerrules import told_layers

    assert survey(open_checkpoint(structure(name)), kinds=told_layers).layers.pattern == expected


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("llama", ("model.embed_tokens.weight", "lm_head.weight", False)),
        ("llama_tied", ("model.embed_tokens.weight", None, True)),
        ("gpt2", ("transformer.wte.weight", None, True)),
        ("gpt_neox", ("gpt_neox.embed_in.weight", "embed_out.weight", False)),
    ],
)
def test_ties_are_told(name, ends, structure, capsys):
    found = told(capsys, structure(name))
    assert (found["embedding"], found["head"], found["tied"]) == ends


def test_the_keys_of_the_json_stay(structure, capsys):
    found = told(capsys, structure("deepseek_v3"))
    assert set(found) == KEYS
    assert set(found["layers"]) == LAYER_KEYS
    assert set(found["layers"]["groups"][0]) == GROUP_KEYS
    assert set(found["parts"][0]) == set(found["dtypes"][0]) == COUNT_KEYS
    assert set(found["files"][0]) == {"name", "bytes", "tensors"}
    assert set(found["tokenizer"]) == {"kind", "tokens", "files", "template"}


def test_dimensions_come_from_the_language_models_part_of_the_config(structure, capsys):
    assert told(capsys, structure("gemma3"))["dimensions"] == {
        "hidden": 32, "feed_forward": 48, "heads": 4, "kv_heads": 2, "head_width": 16,
        "vocabulary": 264, "context": 128, "window": 8,
    }  # fmt: skip


def test_another_tower_is_told_apart(structure, capsys):
    (tower,) = told(capsys, structure("gemma3"))["other_stacks"]
    assert tower["prefix"] == "vision_tower.encoder.layers"
    assert tower["layers"] == 2


def test_active_parameters_leave_out_the_experts_that_a_token_is_not_sent_to(structure, capsys):
    found = told(capsys, structure("mixtral"))
    experts = next(part for part in found["parts"] if part["name"] == "experts")
    assert found["experts"] == {"per_layer": 4, "per_token": 2}
    assert found["active"] == found["parameters"] - experts["parameters"] // 2


def test_tensors_are_listed_on_demand(structure, capsys):
    path = structure("llama")
    listed = told(capsys, path, "--tensors")["tensor_list"]
    with safe_open(path / "model.safetensors", "np") as file:
        shapes = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert {t["name"]: t["shape"] for t in listed} == shapes
    assert {(t["dtype"], t["file"]) for t in listed} == {("F32", "model.safetensors")}


def test_a_bare_file_is_told_from_its_tensors(structure, tmp_path, capsys):
    path = tmp_path / "bare.safetensors"
    shutil.copyfile(structure("llama") / "model.safetensors", path)
    found = told(capsys, path)
    assert (found["kind"], found["name"], found["family"]) == ("file", "bare", "unknown")
    assert found["layers"]["count"] == LAYERS
    assert found["dimensions"] == {"hidden": 32, "vocabulary": 264}
    assert found["tokenizer"] is None


def test_without_layers_the_rest_is_told_with_the_reason(tmp_path, capsys):
    path = tmp_path / "odd.safetensors"
    save_file({"a": np.zeros((2, 3), np.float16)}, path)
    found = told(capsys, path)
    assert found["layers"] is None
    assert found["parts"] == []
    assert found["dtypes"] == [{"name": "F16", "tensors": 1, "parameters": 6, "bytes": 12}]
    assert "no numbered layers" in found["notes"][0]


def test_a_config_that_disagrees_is_noted_and_the_tensors_are_believed(tmp_path, capsys):
    found = told(capsys, make(tmp_path / "m", {"num_hidden_layers": 5}))
    assert found["layers"]["count"] == 2
    assert "num_hidden_layers = 5" in found["notes"][0]


def test_an_encoder_decoder_is_shown_with_a_note(tmp_path, capsys):
    found = told(capsys, make(tmp_path / "m", {"is_encoder_decoder": True}))
    assert found["layers"]["count"] == 2
    assert "encoder-decoder" in found["notes"][0]


def test_kinds_that_do_not_fit_the_layers_are_noted(tmp_path, capsys):
    found = told(capsys, make(tmp_path / "m", {"layer_types": ["full_attention"]}))
    assert found["layers"]["pattern"] == "0-1 dense"
    assert "kinds of 1 layers" in found["notes"][0]


def test_extra_layers_are_counted_apart(tmp_path, capsys):
    config = {"num_nextn_predict_layers": 1}
    found = told(capsys, make(tmp_path / "m", config, tensors_of(layers=3)))
    assert (found["layers"]["count"], found["layers"]["extra"]) == (2, 1)
    assert found["parts"][-1] == {
        "name": "extra layers", "tensors": 2, "parameters": 24, "bytes": 96
    }  # fmt: skip


def test_layers_of_another_shape_are_a_group_of_their_own(tmp_path, capsys):
    tensors = tensors_of(layers=3)
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((8, 4), np.float32)
    found = told(capsys, make(tmp_path / "m", {"num_hidden_layers": 3}, tensors))
    shown = [(g["kind"], g["layers"], g["parameters"]) for g in found["layers"]["groups"]]
    assert shown == [("dense, form 1", "0, 2", 24), ("dense, form 2", "1", 48)]


TOKENIZERS = {
    "byte pairs": (
        {
            "tokenizer__json": {
                "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
                "added_tokens": [{"content": "b"}, {"content": "<s>"}],
            }
        },
        ("BPE", 3),
    ),
    "an old file without type": (
        {"tokenizer__json": {"model": {"vocab": {"a": 0}, "merges": []}}},
        ("BPE", 1),
    ),
    "unigram": (
        {"tokenizer__json": {"model": {"type": "Unigram", "vocab": [["a", 0.0], ["b", -1.5]]}}},
        ("Unigram", 2),
    ),
    "no vocabulary inside": ({"tokenizer__json": {"model": 5}}, ("unknown", None)),
    "SentencePiece": ({"tokenizer__model": "binary"}, ("SentencePiece", None)),
    "vocabulary and merges": (
        {"vocab__json": {"a": 0, "b": 1}, "merges__txt": "a b"},
        ("BPE", 2),
    ),
    "WordPiece": ({"vocab__txt": "a"}, ("WordPiece", None)),
}


@pytest.mark.parametrize(("files", "expected"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_the_tokenizer_is_told_from_its_files(files, expected, tmp_path, capsys):
    found = told(capsys, make(tmp_path / "m", **files))["tokenizer"]
    assert (found["kind"], found["tokens"]) == expected


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({"chat_template__jinja": "{{ x }}"}, "chat_template.jinja"),
        ({"tokenizer_config__json": {"chat_template": "{{ x }}"}}, "tokenizer_config.json"),
        ({"tokenizer_config__json": {}}, None),
    ],
)
def test_the_place_of_the_chat_template_is_told(files, template, tmp_path, capsys):
    model = make(tmp_path / "m", tokenizer__model="binary", **files)
    assert told(capsys, model)["tokenizer"]["template"] == template


NOTED = {
    "a quantized model": ({"quantization_config": {"quant_method": "gptq"}}, {}, "gptq"),
    "a head that is promised and missing": (
        {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False},
        {},
        "promises an output head",
    ),
    "a stored head that the config ties": (
        {"tie_word_embeddings": True},
        {"lm_head.weight": np.zeros((6, 4), np.float32)},
        "lm_head.weight is stored too",
    ),
}


@pytest.mark.parametrize(("config", "more", "words"), NOTED.values(), ids=NOTED)
def test_what_does_not_fit_together_is_noted(config, more, words, tmp_path, capsys):
    found = told(capsys, make(tmp_path / "m", config, tensors_of() | more))
    assert words in found["notes"][0]


def test_a_directory_without_config_is_noted(tmp_path, capsys):
    model = make(tmp_path / "m")
    (model / "config.json").unlink()
    found = told(capsys, model)
    assert found["layers"]["count"] == 2
    assert "no config.json" in found["notes"][0]


def test_more_tokens_than_rows_are_noted(tmp_path, capsys):
    vocabulary = {"model": {"type": "BPE", "vocab": {str(n): n for n in range(7)}}}
    found = told(capsys, make(tmp_path / "m", tokenizer__json=vocabulary))
    assert "7 tokens, the embedding only 6 rows" in found["notes"][0]


def test_many_files_are_not_all_printed(tmp_path, capsys):
    model = make(tmp_path / "m", **{f"note{n}__txt": "x" for n in range(12)})
    assert main(["inspect", str(model)]) == 0
    assert "and 5 more" in capsys.readouterr().out


def test_what_was_found_is_told_in_words(structure, tmp_path, capsys):
    config = {"quantization_config": {"quant_method": "gptq"}, "num_nextn_predict_layers": 1}
    assert main(["inspect", str(make(tmp_path / "m", config, tensors_of(layers=3)))]) == 0
    assert main(["inspect", str(structure("gemma3"))]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "quantized gptq",
        "and 1 extra (next-token predictors)",
        "vision_tower.encoder.layers: 2 modules",
        "tied to the embedding",
        "128 positions, sliding window 8",
        "4, 2 for keys and values, 16 wide",
        "BPE (tokenizer.json), 258 tokens",
    ):
        assert words in text


def test_on_a_terminal_shares_are_bars(structure, monkeypatch, capsys):
    from cli import render

    monkeypatch.setenv("FORCE_COLOR", "1")
    render._console.cache_clear()
    assert main(["inspect", str(structure("llama"))]) == 0
    render._console.cache_clear()
    assert "\u2588\u2588" in capsys.readouterr().out


def test_the_record_of_a_result_is_told(tmp_path, capsys):
    base, out = make(tmp_path / "base"), tmp_path / "out"
    assert main(["stack", str(base), "--factor", "2", "-o", str(out)]) == 0
    record = told(capsys, out)["record"]
    assert record["operation"] == "stack"
    assert record["inputs"] == [str(base)]
    assert main(["inspect", str(out)]) == 0
    assert "made by stack" in capsys.readouterr().out


def test_a_broken_record_is_noted(tmp_path, capsys):
    model = make(tmp_path / "m", surgery__json={"surgery": 99})
    found = told(capsys, model)
    assert found["record"] is None
    assert "format 99" in found["notes"][0]


def test_text_that_utf8_cannot_hold_is_escaped(tmp_path, capsys):
    lone = '{"surgery": 1, "operation": "\\ud800", "inputs": []}'
    found = told(capsys, make(tmp_path / "m", surgery__json=lone))
    assert found["record"]["operation"] == "\ud800"


def test_names_cannot_drive_the_terminal(tmp_path, capsys):
    model = make(tmp_path / "m", {"architectures": ["\x1b[31mred"]})
    assert main(["inspect", str(model)]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere"], 1, "does not exist"),
        ([], 2, "Missing argument"),
        (["a", "b"], 2, "unexpected extra argument"),
    ],
)
def test_wrong_use_is_one_sentence(arguments, code, words, capsys):
    assert main(["inspect", *arguments]) == code
    seen = capsys.readouterr()
    assert words in seen.err
    assert seen.err.count("\n") == 1
    assert seen.out == ""


PROBE = """
import sys
from cli.main import main
code = main(["inspect", sys.argv[1], "--tensors"])
heavy = {"torch", "transformers", "numpy", "plotly"} & set(sys.modules)
print(f"loaded {sorted(heavy)}", file=sys.stderr)
sys.exit(code)
"""


def test_nothing_heavy_is_imported(structure):
    done = subprocess.run(
        [sys.executable, "-c", PROBE, structure("llama")],
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stderr.strip() == "loaded []"


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([0], "0"), ([0, 1, 2], "0-2"), ([0, 2, 3, 7], "0, 2-3, 7"), ([], "")],
)
def test_numbers_are_written_as_ranges(numbers, text):
    assert ranges(numbers) == text


@pytest.mark.parametrize(
    ("kinds", "text"),
    [
        ("a", "0 a"),
        ("aaa", "0-2 a"),
        ("abab", "2 x (1 a, 1 b)"),
        ("ababa", "2 x (1 a, 1 b), 1 a"),
        ("aabaabaa", "2 x (2 a, 1 b), 2 a"),
        ("abb", "0 a, 1-2 b"),
    ],
)
def test_a_sequence_of_kinds_is_written_by_period_or_number(kinds, text):
    assert pattern(list(kinds)) == text


@pytest.mark.parametrize("name", ["base", "uni", "v2"])
def test_the_trained_models_are_told_without_a_note(name, fixtures_dir, capsys):
    if not (fixtures_dir / name / "model.safetensors").exists():
        pytest.skip("the trained models are not here")
    found = told(capsys, fixtures_dir / name)
    assert found["family"] == "llama"
    assert found["notes"] == []
    assert found["tokenizer"]["tokens"] == found["dimensions"]["vocabulary"]
