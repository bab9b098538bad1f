"""Tokens and bytes: what is scored, and what its text weighs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from surgery.evaluate.documents import Document
from surgery.evaluate.tokens import difference_between, encode, find_mark


def encoded(tokenizer: Any, *texts: str) -> list[Any]:
    documents = [Document(domain="d", name="d", text=text) for text in texts]
    return encode(tokenizer, documents, mark=find_mark(tokenizer))


@pytest.mark.parametrize(
    ("bos", "adds", "kind"),
    [("<s>", False, "document"), ("<s>", True, "window"), (None, False, "none")],
)
def test_the_mark_stands_where_the_tokenizer_says(
    make_tokenizer: Callable[..., Any], bos: str | None, adds: bool, kind: str
) -> None:
    assert find_mark(make_tokenizer(bos=bos, adds=adds)).kind == kind


@pytest.mark.parametrize("adds", [False, True])
def test_with_a_mark_every_byte_and_token_is_scored(
    make_tokenizer: Callable[..., Any], adds: bool
) -> None:
    tokenizer = make_tokenizer(adds=adds)
    (found,) = encoded(tokenizer, "dé日")
    assert (found.ids[0], found.given, len(found.ids), found.size) == (
        tokenizer.bos_token_id,
        1,
        1 + 6,
        6,
    )
    assert found.sink is adds


@pytest.mark.parametrize(
    ("text", "given", "size"),
    [
        ("dog", 1, 2),
        ("the end", 1, 4),  # "the" is one token: its three bytes go
        ("日x", 3, 1),  # one character in three tokens: all of it goes
        ("日", 3, 0),
        ("d", 1, 0),
        (" d", 1, 1),
    ],
)
def test_without_a_mark_the_first_token_goes_with_all_its_bytes(
    make_tokenizer: Callable[..., Any], text: str, given: int, size: int
) -> None:
    (found,) = encoded(make_tokenizer(bos=None, merges=4), text)
    assert (found.given, found.size) == (given, size)


def test_unknown_tokens_are_counted() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1, "dog": 2}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", unk_token="<unk>")
    assert encoded(tokenizer, "dog cat dog bird")[0].unknown == 2


@pytest.mark.parametrize(
    ("child", "said"),
    [
        ({}, None),
        ({"merges": 2}, "260 tokens against the parent's 258"),
        ({"bos": None}, "one text gives other tokens"),
    ],
)
def test_tokenizers_are_told_apart(
    make_tokenizer: Callable[..., Any], child: dict[str, Any], said: str | None
) -> None:
    parent, other = make_tokenizer(), make_tokenizer(**child)
    pairs = list(zip(encoded(parent, "the dog"), encoded(other, "the dog"), strict=True))
    found = difference_between(parent, other, pairs)
    assert found is None if said is None else said in str(found)


def test_other_ids_for_the_same_number_of_tokens_are_told() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    one, two = (
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(v, unk_token="a")))
        for v in ({"a": 0, "b": 1}, {"a": 1, "b": 0})
    )
    assert "under other names or ids" in str(difference_between(one, two, []))
