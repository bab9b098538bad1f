"""Chat templates: kept, by name, of a model, by majority, as written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent))
import speakers

from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.errors import RecipeError
from surgery.vocabulary import choose_template, find_template, unify
from surgery.vocabulary.builtin_templates import BUILTIN

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Bye"},
]
# What each format's own description shows for this talk, an answer being asked for.
RENDERED = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "mistral": "<s>[INST] Be brief.\n\nHi [/INST] Yes?</s>[INST] Bye [/INST]",
    "alpaca": (
        "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nYes?</s>\n\n"
        "### Instruction:\nBye\n\n### Response:\n"
    ),
    "exaone": (
        "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Yes?[|endofturn|]\n"
        "[|user|]Bye\n[|assistant|]"
    ),
}


@pytest.fixture
def pair(tmp_path: Path) -> list[Checkpoint]:
    return [
        speakers.speaker(tmp_path, "fox", template="fox: {{ messages }}"),
        speakers.speaker(tmp_path, "sums"),
    ]


def template_of(made: Path) -> str | None:
    found: str | None = AutoTokenizer.from_pretrained(made).chat_template
    return found


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_a_built_in_template_renders_as_its_format_is_described(
    pair: list[Checkpoint], name: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair[0].root)
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    tokenizer.chat_template = BUILTIN[name]
    found = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert found == RENDERED[name]


@pytest.mark.parametrize("choice", ["union", "base", "sums"])
def test_the_template_comes_with_the_tokenizer_by_default(
    pair: list[Checkpoint], choice: str, tmp_path: Path
) -> None:
    unified = unify(pair, choice=choice, base=0, names=["fox", "sums"])
    made = speakers.written(unified, 0, tmp_path / "out")
    assert template_of(made) == (None if choice == "sums" else "fox: {{ messages }}")


@pytest.mark.parametrize(
    ("choice", "text", "rule"),
    [
        ("chatml", BUILTIN["chatml"], "built-in chatml"),
        ("fox", "fox: {{ messages }}", "that of fox"),
        ("auto", "fox: {{ messages }}", "auto: that of fox, which 1 of 2 have"),
        ("mine {{ messages }}", "mine {{ messages }}", "as written in the recipe"),
    ],
)
def test_a_chosen_template_is_written_and_its_rule_recorded(
    pair: list[Checkpoint], choice: str, text: str, rule: str, tmp_path: Path
) -> None:
    unified = unify(pair, choice="sums", base=0, names=["fox", "sums"], chat_template=choice)
    assert unified.facts["chat_template"] == rule
    assert template_of(speakers.written(unified, 0, tmp_path / "out")) == text


def test_a_template_can_be_changed_where_the_vocabularies_agree(
    pair: list[Checkpoint], tmp_path: Path
) -> None:
    unified = unify(pair[:1], chat_template="chatml")
    assert unified.facts["chat_template"] == "built-in chatml"
    assert template_of(speakers.written(unified, 0, tmp_path / "out")) == BUILTIN["chatml"]


def test_a_template_in_the_settings_gives_way_to_the_new_one(
    pair: list[Checkpoint], tmp_path: Path
) -> None:
    folder = pair[1].root
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    old = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d {{ messages }}"}]
    settings["chat_template"] = old
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "d"}))
    model = open_checkpoint(folder)
    assert find_template(model) == "d {{ messages }}"
    made = speakers.written(unify([model], chat_template="chatml"), 0, tmp_path / "out")
    assert "chat_template" not in json.loads((made / "tokenizer_config.json").read_text())
    assert (
        json.loads((made / "chat_template.json").read_text())["chat_template"] == BUILTIN["chatml"]
    )
    assert template_of(made) == BUILTIN["chatml"]


def test_auto_takes_what_most_have_and_the_first_of_several(tmp_path: Path) -> None:
    texts = ["a {{ messages }}", "b {{ messages }}", "b {{ messages }}", None]
    models = [
        speakers.speaker(tmp_path / str(n), "fox", template=text) for n, text in enumerate(texts)
    ]
    names = list("wxyz")
    assert choose_template("auto", models, names).text == "b {{ messages }}"
    assert choose_template("auto", models[:2], names).text == "a {{ messages }}"
    assert choose_template("auto", models[3:], names).text is None


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("chatmll", "did you mean 'chatml'"),
        ("nonsense", "is no template; choose auto, alpaca"),
        ("{% for m in messages %}", "is no Jinja"),
        ("sums", "sums has no chat template"),
    ],
)
def test_a_template_that_there_is_not_is_told(
    pair: list[Checkpoint], choice: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        choose_template(choice, pair, ["fox", "sums"])
