"""Chats as tokens through the tokenizer's own template, and which of them the assistant says."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from surgery.errors import CheckpointError, RecipeError
from surgery.recover.sources import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Span = tuple[int, int]

ASSISTANT = "assistant"
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
Tokens = tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]


def check_chats(tokenizer: "PreTrainedTokenizerBase", place: str) -> None:
    """Refuse chats where the tokenizer cannot do them.

    Raises:
        RecipeError: it has no chat template, or tells no offsets.
    """
    if not tokenizer.chat_template:
        fact = "is a chat, and the model's tokenizer has no chat template"
        raise RecipeError(place, fact, "add chat_template.jinja to the model, or give texts")
    if not tokenizer.is_fast:
        fact = "is a chat, and the model's tokenizer tells no offsets of tokens"
        raise RecipeError(place, fact, "add its tokenizer.json")


def encode_chat(tokenizer: "PreTrainedTokenizerBase", record: Record) -> list[Tokens]:
    """Return the tokens of a chat, and of each whether it is to be predicted; shapes [tokens].

    The assistant's part of a turn is what the template adds behind the prompt for an answer, the
    mark that ends the turn included; a template that marks it with `generation` has the say. Some
    templates write an earlier turn otherwise than the last (they drop its thoughts). There every
    turn becomes a document of its own that ends with it, as the model sees it when it answers.

    Raises:
        CheckpointError: the template refuses the chat, nobody answers in it, or a text with an
            answer does not begin with its prompt.
    """
    turns = [i for i, m in enumerate(record.messages) if m["role"] == ASSISTANT]
    if not turns:
        raise CheckpointError(record.name, "no message of the assistant", "remove the chat")
    if _MARKER.search(tokenizer.get_chat_template()):
        return [_marked(tokenizer, record)]
    whole = _rendered(tokenizer, record, len(record.messages), prompt=False)
    found = [_turn(tokenizer, record, turn) for turn in turns]
    if all(whole.startswith(text) for text, _ in found):
        return [_tokens(tokenizer, whole, [span for _, span in found])]
    return [_tokens(tokenizer, text, [span]) for text, span in found]


def said(offsets: Sequence["Span"], spans: Sequence["Span"]) -> Iterator[bool]:
    """Tell of every token whether all of its characters are in one of the spans, both in order.

    A token that begins in the prompt is not: the model is never asked for it.
    """
    left = iter(spans)
    begin, end = next(left)
    for first, last in offsets:
        while first >= end and (following := next(left, None)):
            begin, end = following
        yield begin <= first < last <= end


def _turn(tokenizer: "PreTrainedTokenizerBase", record: Record, turn: int) -> "tuple[str, Span]":
    before = _rendered(tokenizer, record, turn, prompt=True) if turn else ""
    after = _rendered(tokenizer, record, turn + 1, prompt=False)
    if not after.startswith(before) or len(after) == len(before):
        fact = f"the chat template does not write message {turn + 1} behind its prompt"
        raise CheckpointError(record.name, fact, "mark its answers with {% generation %}")
    return after, (len(before), len(after))


def _tokens(tokenizer: "PreTrainedTokenizerBase", text: str, spans: Sequence["Span"]) -> Tokens:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    mask = np.fromiter(said(found["offset_mapping"], spans), np.bool_)
    return np.asarray(found["input_ids"], np.int32), mask


def _marked(tokenizer: "PreTrainedTokenizerBase", record: Record) -> Tokens:
    with _told(record):
        found = tokenizer.apply_chat_template(
            list(record.messages),
            tools=_tools(record),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    return np.asarray(found["input_ids"], np.int32), np.asarray(found["assistant_masks"], np.bool_)


def _rendered(
    tokenizer: "PreTrainedTokenizerBase", record: Record, count: int, *, prompt: bool
) -> str:
    with _told(record):
        text: str = tokenizer.apply_chat_template(
            list(record.messages[:count]),
            tools=_tools(record),
            tokenize=False,
            add_generation_prompt=prompt,
        )
    return text


def _tools(record: Record) -> list[Any] | None:
    return list(record.tools) if record.tools else None


@contextmanager
def _told(record: Record) -> Iterator[None]:
    """Turn whatever a template raises into one sentence with its place."""
    try:
        yield
    except Exception as error:
        words = " ".join(str(error).split())[:200]
        fact = f"the chat template refuses the chat ({type(error).__name__}: {words})"
        raise CheckpointError(record.name, fact, "repair the chat") from error
