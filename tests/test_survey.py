"""What is told of a checkpoint: kinds of layers, tokenizers, and a note for what does not fit."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from surgery.survey.layers import pattern, ranges
from surveyed import make, tensors_of, told


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
