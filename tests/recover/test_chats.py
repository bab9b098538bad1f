"""Chats through templates: exactly the assistant's tokens are predicted."""

from __future__ import annotations

import json
from copy import deepcopy
from types import SimpleNamespace

import pytest

from surgery.errors import CheckpointError, RecipeError
from surgery.evaluate.tokens import Mark
from surgery.recover.chats import check_chats, encode_chat, said
from surgery.recover.data import IGNORED, Source, open_rows
from surgery.recover.sources import Record

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}\n"
    "{% else %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# The thoughts of the last turn alone, as some reasoning models write them.
FORGETFUL = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n</think>\n{% endif %}"
    "{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
BACKWARDS = "{% for m in messages|reverse %}{{ m.content }}\n{% endfor %}"
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no\nsystem') }}{% endif %}x"

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "import what"},
    {"role": "assistant", "content": "import os"},
    {"role": "user", "content": "and"},
    {"role": "assistant", "content": "def f(x): return 12"},
]


@pytest.fixture(scope="module")
def plain(fixtures_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(fixtures_dir / "base")


@pytest.fixture
def templated(plain):
    """The fixtures' tokenizer with a chat template."""

    def get(template: str):
        tokenizer = deepcopy(plain)
        tokenizer.chat_template = template
        return tokenizer

    return get


def record(messages=CHAT) -> Record:
    return Record(1, "a.jsonl:1", messages=tuple(messages))


def spoken(tokenizer, tokens) -> list[str]:
    """The runs of tokens that are predicted, as text."""
    ids, mask = tokens
    runs, before = [], False
    for token, wanted in zip(ids.tolist(), mask.tolist(), strict=True):
        if wanted and not before:
            runs.append([])
        if wanted:
            runs[-1].append(token)
        before = wanted
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (CHATML, ["import os<|end|>\n", "def f(x): return 12<|end|>\n"]),
        (MARKED, ["import os<|end|>", "def f(x): return 12<|end|>"]),
    ],
)
def test_only_what_the_assistant_says_is_predicted(templated, template, answers):
    tokenizer = templated(template)
    (tokens,) = encode_chat(tokenizer, record())
    assert spoken(tokenizer, tokens) == answers


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_the_tokens_are_those_of_the_template(templated, template):
    tokenizer = templated(template)
    (tokens,) = encode_chat(tokenizer, record())
    whole = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    assert tokens[0].tolist() == whole


def test_an_earlier_turn_that_is_written_otherwise_becomes_a_document_of_its_own(templated):
    tokenizer = templated(FORGETFUL)
    found = encode_chat(tokenizer, record())
    assert [spoken(tokenizer, tokens) for tokens in found] == [
        ["<think>\n</think>\nimport os<|end|>\n"],
        ["<think>\n</think>\ndef f(x): return 12<|end|>\n"],
    ]
    for turn, (ids, _) in zip((3, 5), found, strict=True):
        same = tokenizer.apply_chat_template(CHAT[:turn], return_dict=True)["input_ids"]
        assert ids.tolist() == same


def test_what_is_predicted_is_what_follows_the_prompt_for_an_answer(templated):
    tokenizer = templated(CHATML)
    prompt = tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    ((ids, mask),) = encode_chat(tokenizer, record(CHAT[:3]))
    assert ids[: len(prompt)].tolist() == prompt
    assert mask.tolist() == [False] * len(prompt) + [True] * (len(ids) - len(prompt))


@pytest.mark.parametrize(
    ("offsets", "found"),
    [
        ([(0, 2), (2, 4), (4, 6), (6, 9)], [False, True, True, False]),
        ([(0, 3), (3, 4), (4, 7), (7, 9)], [False, True, False, False]),  # across an edge
        ([(0, 2), (2, 2), (2, 6), (9, 11), (11, 13)], [False, False, True, False, True]),
    ],
)
def test_a_token_counts_only_if_all_of_it_is_in_a_span(offsets, found):
    assert list(said(offsets, [(2, 6), (11, 13)])) == found


REFUSED = {
    "nobody answers": (CHATML, CHAT[:2], "a.jsonl:1: no message of the assistant"),
    "raised by the template": (STRICT, CHAT, r"refuses the chat \(TemplateError: no system\)"),
    "no prompt": (BACKWARDS, CHAT, "does not write message 3 behind its prompt"),
    "no content": (CHATML + "{{ messages[0]['content'] + 1 }}", CHAT, "refuses the chat"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_chat_that_cannot_be_masked_is_told(templated, case):
    template, messages, words = REFUSED[case]
    with pytest.raises(CheckpointError, match=words):
        encode_chat(templated(template), record(messages))


def test_tokenizers_that_cannot_do_chats_are_refused(plain):
    with pytest.raises(RecipeError, match="has no chat template"):
        check_chats(plain, "a.jsonl:1")
    slow = SimpleNamespace(chat_template=CHATML, is_fast=False)
    with pytest.raises(RecipeError, match="tells no offsets of tokens"):
        check_chats(slow, "a.jsonl:1")


def test_rows_of_chats_predict_answers_alone(templated, tmp_path):
    tokenizer = templated(CHATML)
    path = tmp_path / "a.jsonl"
    chats = [CHAT, [{**CHAT[1], "content": "b"}, {**CHAT[2], "content": "yes"}]]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    rows = open_rows(
        [Source(path)], tokenizer, context=512, seed=0, mark=Mark(0, every_window=False)
    )
    (row,) = (rows.row(index) for index in range(len(rows)))
    kept = row.targets[row.targets != IGNORED]
    assert tokenizer.decode(kept) == ("import os<|end|>\ndef f(x): return 12<|end|>\nyes<|end|>\n")
    assert 0 not in row.ids[: rows.tokens]  # the template alone sets marks
