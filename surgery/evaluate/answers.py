"""Questions answered by a model: the choice to which it gives the most probability."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from surgery.errors import RecipeError, TrainError
from surgery.evaluate.choices import Question, Questions
from surgery.evaluate.load import Loaded
from surgery.evaluate.score import score
from surgery.evaluate.tasks import Outcome, numbered
from surgery.evaluate.tokens import Encoded, Mark

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a choice's log-probability is divided by, and what the accuracy is called then.
LENGTHS: Mapping[str, str] = MappingProxyType(
    {"none": "acc", "characters": "acc_characters", "bytes": "acc_bytes", "tokens": "acc_tokens"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """One choice of one question, tokenized, and its lengths by name."""

    encoded: Encoded
    lengths: dict[str, int]


def check_lengths(normalize: str) -> None:
    """Refuse a length that is not known.

    Raises:
        RecipeError: It is not one of `LENGTHS`.
    """
    if normalize not in LENGTHS:
        known = ", ".join(LENGTHS)
        raise RecipeError("--normalize", f"{normalize} is not a length", f"give one of {known}")


def answer(
    loaded: Loaded,
    tokenizer: "PreTrainedTokenizerBase",
    questions: Questions,
    *,
    mark: Mark,
    context: int,
    batch_tokens: int,
    normalize: str = "none",
) -> Outcome:
    """Answer every question, and say which answers are right.

    A choice scores the log-probability of its tokens behind the prompt, over its length if
    asked; spaces that end the prompt belong to the choice. An answer is right where its choice
    scores more than every other: a tie is wrong, whichever stands first. Without a
    beginning-of-sequence mark and a prompt, the first token of a choice is not scored.

    Raises:
        TrainError: A choice alone is longer than the context, or the model cannot be scored.
    """
    choices = [
        _encode(tokenizer, question, choice, mark=mark, context=context)
        for question in questions.items
        for choice in question.choices
    ]
    scores = score(
        loaded,
        [choice.encoded for choice in choices],
        names=[q.name for q in questions.items for _ in q.choices],
        context=context,
        stride=context,
        batch_tokens=batch_tokens,
    )
    logs = [-float(s.nats.sum(dtype=np.float64)) for s in scores]
    right = {
        metric: right_answers(
            questions.items, [x / c.lengths[by] for x, c in zip(logs, choices, strict=True)]
        )
        for by, metric in LENGTHS.items()
    }
    metric = LENGTHS[normalize]
    names = numbered([q.digest for q in questions.items])
    return Outcome(
        task=questions.name,
        kind="pairs",
        metric=metric,
        value=float(np.mean(right[metric])),
        documents=dict(zip(names, right[metric], strict=True)),
        metrics={name: float(np.mean(values)) for name, values in right.items()},
    )


def right_answers(questions: Sequence[Question], scores: Sequence[float]) -> list[float]:
    """Return 1 where the right choice scores more than every other, else 0.

    Shapes: scores are those of all choices, question after question.
    """
    found, at = [], 0
    for question in questions:
        mine = scores[at : (at := at + len(question.choices))]
        others = [x for i, x in enumerate(mine) if i != question.answer]
        found.append(float(mine[question.answer] > max(others)))
    return found


def _encode(
    tokenizer: "PreTrainedTokenizerBase",
    question: Question,
    choice: str,
    *,
    mark: Mark,
    context: int,
) -> _Choice:
    """Tokenize prompt and choice as one text, and find where the choice begins in it."""
    prompt = question.prompt.rstrip()
    text = question.prompt + choice
    before, whole = (
        tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"] for t in (prompt, text)
    )
    head = [] if mark.token is None else [mark.token]
    ids = [*head, *whole]
    given = max(1, len(head) + len(before))
    count = len(ids) - given
    if count < 1:
        raise TrainError(question.name, "a choice has no token to score", "give longer choices")
    if count > context:
        fact = f"a choice has {count} tokens, more than the context of {context}"
        raise TrainError(question.name, fact, "shorten it, or raise --context")
    cut = max(0, len(ids) - (context + 1))
    ids = ids[cut:]
    if cut and mark.every_window and given - cut > 1:
        ids[0] = head[0]
    return _Choice(
        encoded=Encoded(
            ids=np.asarray(ids, dtype=np.int64), given=given - cut, sink=False, size=0, unknown=0
        ),
        lengths={
            "none": 1,
            "characters": len(choice),
            "bytes": len(choice.encode()),
            "tokens": count,
        },
    )
