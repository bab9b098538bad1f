"""Rows of single tokens, as a recipe's `tokens` table asks for them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent))
import speakers

from surgery.checkpoint import Checkpoint
from surgery.errors import RecipeError
from surgery.vocabulary import read_vocabulary, unify

NAMES = ["fox", "sums"]


@pytest.fixture
def pair(tmp_path: Path) -> list[Checkpoint]:
    return [
        speakers.speaker(tmp_path, "fox", ("<|end|>",), padding=4),
        speakers.speaker(tmp_path, "sums", ("<|end|>", "<|pad|>")),
    ]


def rows_of_token(pair: list[Checkpoint], tmp_path: Path, token: str, told: Any) -> list[float]:
    """What each model has in the row of a token, once its entry is followed."""
    unified = unify(pair, choice="union", base=0, names=NAMES, tokens={token: told})
    outs = [speakers.written(unified, n, tmp_path / f"out{n}") for n in (0, 1)]
    return [float(speakers.rows(out)[unified.ids[token]]) for out in outs]


TOLD: list[tuple[str, Any, list[Any]]] = [
    ("Ġfox", {"source": "fox"}, [("fox", "Ġfox"), ("fox", "Ġfox")]),
    ("Ġthe", {"source": "fox"}, [("fox", "Ġthe"), ("sums", "Ġthe")]),
    ("Ġthe", {"source": "fox", "force": True}, [("fox", "Ġthe"), ("fox", "Ġthe")]),
    ("Ġnum", {"source": {"kind": "zero"}}, [0, ("sums", "Ġnum")]),
    ("Ġnum", {"source": {"kind": "zero"}, "force": True}, [0, 0]),
    (
        "<|pad|>",
        {"source": {"kind": "model_token", "model": "fox", "token": "!"}},
        [("fox", "!"), ("sums", "<|pad|>")],
    ),
    ("<|pad|>", {"source": {"kind": "model_token", "model": "sums", "token_id": 7}}, [2007, None]),
    ("<|new|>", {"source": {"kind": "model_token", "model": "fox", "token_id": 3}}, [1003, 1003]),
    ("<|new|>", {"source": {"kind": "model", "model": {"model": {"path": "sums"}}}}, "no token"),
]


@pytest.mark.parametrize(("token", "told", "expected"), TOLD)
def test_a_row_comes_from_where_it_is_said(
    pair: list[Checkpoint], tmp_path: Path, token: str, told: Any, expected: Any
) -> None:
    if isinstance(expected, str):
        with pytest.raises(RecipeError, match=expected):
            unify(pair, choice="union", base=0, names=NAMES, tokens={token: told})
        return
    ids = {name: read_vocabulary(model).ids for name, model in zip(NAMES, pair, strict=True)}
    expected = [
        speakers.MARKS[e[0]] + ids[e[0]][e[1]] if isinstance(e, tuple) else e for e in expected
    ]
    found = rows_of_token(pair, tmp_path, token, told)
    assert [f for f, e in zip(found, expected, strict=True) if e is not None] == [
        e for e in expected if e is not None
    ]


def test_a_token_that_no_tokenizer_has_is_added_behind_the_last(
    pair: list[Checkpoint], tmp_path: Path
) -> None:
    told = {"<|new|>": {"source": {"kind": "zero"}}, "<|pad|>": {"source": "sums"}}
    unified = unify(pair, choice="base", base=0, names=NAMES, tokens=told)
    last = len(read_vocabulary(pair[0]).ids)
    assert unified.size == last + 4  # two of four rows of padding have names now
    made = AutoTokenizer.from_pretrained(speakers.written(unified, 0, tmp_path / "out"))
    assert made.encode("fox<|new|><|pad|>")[-2:] == [last, last + 1]
    added = json.loads(unified.written["tokenizer.json"])["added_tokens"]
    assert [(a["content"], a["special"]) for a in added[-2:]] == [
        ("<|new|>", False),
        ("<|pad|>", True),
    ]


WRONG: list[tuple[Any, str]] = [
    ({"sauce": "fox"}, "did you mean 'source'"),
    ({}, "has no source"),
    ("fox", "write a table"),
    ({"source": "foxes"}, "did you mean fox"),
    ({"source": {"kind": "one"}}, "name a model, or a kind"),
    ({"source": 3}, "name a model, or a kind"),
    ({"source": "fox", "force": 1}, "true or false"),
    ({"source": {"kind": "zero", "model": "fox"}}, "has no key 'model'"),
    ({"source": {"kind": "model_token", "model": "fox"}}, "either token or token_id"),
    ({"source": {"kind": "model_token", "model": "fox", "token_id": 9999}}, "has no row 9999"),
    ({"source": {"kind": "model_token", "model": "fox", "token": "~~"}}, "has no token '~~'"),
]


@pytest.mark.parametrize(("told", "message"), WRONG)
def test_an_entry_that_makes_no_sense_is_told(
    pair: list[Checkpoint], told: Any, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        unify(pair, choice="union", base=0, names=NAMES, tokens={"Ġthe": told})


@pytest.mark.parametrize("multiple", [0, -4, 1.5, True])
def test_a_multiple_is_a_number_above_zero(pair: list[Checkpoint], multiple: Any) -> None:
    with pytest.raises(RecipeError, match="pad_to_multiple_of"):
        unify(pair, choice="union", base=0, pad_to_multiple_of=multiple)
