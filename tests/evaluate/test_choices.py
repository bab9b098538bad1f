"""Questions: read, refused, and answered as a slow reference would."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery.errors import CheckpointError, RecipeError, TrainError
from surgery.evaluate import evaluate
from surgery.evaluate.answers import right_answers
from surgery.evaluate.choices import Question, read_questions

Make = Callable[..., Path]
QUIZ = [
    {"prompt": "the cat ", "choices": ["sat on a mat;", "was", "here. the the"], "answer": 2},
    {"prompt": "", "choices": ["a mat;", "été 日本"], "answer": 0},
    {"good": "the cat was here.", "bad": "cat the here. was a"},
    {"prompt": "on a", "good": " mat;", "bad": " the été"},
]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    return write(tmp_path / "quiz.jsonl", QUIZ)


def naive_log(model: Any, tokenizer: Any, prompt: str, choice: str) -> float:
    """Log-probability of a choice, a forward pass for each of its bytes: a token is a byte."""
    ids = [tokenizer.bos_token_id, *tokenizer(prompt.rstrip() or "")["input_ids"]]
    rest = tokenizer(prompt[len(prompt.rstrip()) :] + choice)["input_ids"]
    total = 0.0
    for token in rest:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        total += float(logits.log_softmax(-1)[token])
        ids.append(token)
    return total


@pytest.mark.parametrize("normalize", ["none", "characters", "bytes", "tokens"])
def test_answers_equal_one_token_at_a_time(
    make_model: Make, documents: Path, quiz: Path, normalize: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = make_model(seed=0)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    (questions,) = read_questions([quiz])
    expected = []
    for question in questions.items:
        scores = []
        for choice in question.choices:
            log = naive_log(model, tokenizer, question.prompt, choice)
            spaces = len(question.prompt) - len(question.prompt.rstrip())
            length = {
                "none": 1,
                "characters": len(choice),
                "bytes": len(choice.encode()),
                "tokens": len(choice.encode()) + spaces,
            }[normalize]
            scores.append(log / length)
        best = max(range(len(scores)), key=scores.__getitem__)
        expected.append(float(best == question.answer))
    (task,) = evaluate([path], [documents], pairs=[quiz], normalize=normalize).tasks
    assert list(task.models[0].documents.values()) == expected
    assert task.models[0].value == pytest.approx(sum(expected) / len(expected))


def test_a_tie_is_wrong_whichever_choice_stands_first() -> None:
    items = [
        Question(name="q", prompt="", choices=("a", "b"), answer=answer) for answer in (0, 1, 0)
    ]
    assert right_answers(items, [-1.0, -1.0, -1.0, -1.0, -1.0, -2.0]) == [0, 0, 1]


def test_a_long_prompt_is_cut_on_the_left(
    make_model: Make, documents: Path, tmp_path: Path
) -> None:
    ending = {"choices": ["mat;", "cat!"], "answer": 0}
    # 28 bytes of prompt and 4 of a choice, so the mark is gone from both once they are cut.
    long = write(tmp_path / "long.jsonl", [{"prompt": "x" * 90 + "y" * 29} | ending])
    longer = write(tmp_path / "longer.jsonl", [{"prompt": "z" * 300 + "y" * 29} | ending])
    found = evaluate([make_model(seed=0)], [documents], pairs=[long, longer]).tasks
    assert found[0].models[0].metrics == found[1].models[0].metrics


def test_a_child_is_compared_with_its_parent_question_by_question(
    make_model: Make, documents: Path, quiz: Path
) -> None:
    models = [make_model(seed=0), make_model(seed=1)]
    (task,) = evaluate(models, [documents], pairs=[quiz]).tasks
    (difference,) = task.differences
    assert (difference.child, difference.parent) == (str(models[1]), str(models[0]))
    assert difference.documents == 4
    mine, theirs = (list(m.documents.values()) for m in reversed(task.models))
    assert difference.only_child == sum(a > b for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(
    ("line", "fact"),
    [
        ("nonsense", "the line is not JSON"),
        ("[1]", "the line is not a JSON object"),
        ('{"prompt": "a"}', "the line is no question"),
        ('{"good": "a"}', "choices are not two or more texts"),
        ('{"good": "a", "bad": ""}', "choices are not two or more texts"),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', "choices are not two or more texts"),
        ('{"prompt": "a", "choices": ["b", "b"], "answer": 0}', "two choices are the same"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "not a number from 0 to 1"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": true}', "not a number from 0 to 1"),
        ('{"prompt": "a", "choices": ["b", "c"]}', "not a number from 0 to 1"),
        ('{"prompt": "\\ud800", "choices": ["b", "c"], "answer": 0}', "half a surrogate pair"),
        ("", "the file holds no question"),
    ],
)
def test_what_is_no_question_is_refused(tmp_path: Path, line: str, fact: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(CheckpointError, match=r"bad\.jsonl") as error:
        read_questions([path])
    assert fact in str(error.value)


def test_two_files_of_one_name_are_refused(tmp_path: Path, quiz: Path) -> None:
    (tmp_path / "more").mkdir()
    other = write(tmp_path / "more" / "quiz.jsonl", QUIZ)
    with pytest.raises(RecipeError, match="two files are called quiz"):
        read_questions([quiz, other])


def test_a_choice_longer_than_the_context_is_refused(
    make_model: Make, documents: Path, tmp_path: Path
) -> None:
    quiz = write(tmp_path / "wide.jsonl", [{"good": "x" * 40, "bad": "y"}])
    with pytest.raises(TrainError, match="a choice has 40 tokens, more than the context of 32"):
        evaluate([make_model(seed=0)], [documents], pairs=[quiz])
