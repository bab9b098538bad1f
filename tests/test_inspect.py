"""`surgery inspect`: what is told of every kind of checkpoint, in every form."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open

from cli.main import main
from structures import LAYERS, STRUCTURES
from surgery.checkpoint import open_checkpoint
from surgery.survey import survey
from surveyed import make, tensors_of, told

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
    from surgery.layers.rules import told_layers

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


@pytest.mark.parametrize("name", ["base", "uni", "v2"])
def test_the_trained_models_are_told_without_a_note(name, fixtures_dir, capsys):
    if not (fixtures_dir / name / "model.safetensors").exists():
        pytest.skip("the trained models are not here")
    found = told(capsys, fixtures_dir / name)
    assert found["family"] == "llama"
    assert found["notes"] == []
    assert found["tokenizer"]["tokens"] == found["dimensions"]["vocabulary"]
