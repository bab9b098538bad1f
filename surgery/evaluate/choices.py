"""Files of minimal pairs and multiple choice: a line is a prompt, its choices and the answer."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError, RecipeError

_REMEDY = 'give "good" and "bad", or "prompt", "choices" and "answer"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One line of a file.

    Attributes:
        name: The file and the line.
        prompt: What stands before every choice; may be empty.
        choices: Two or more texts.
        answer: Which choice is right, counted from 0.
    """

    name: str
    prompt: str
    choices: tuple[str, ...]
    answer: int

    @property
    def digest(self) -> str:
        """Return what tells the question apart, wherever it stands."""
        plain = json.dumps([self.prompt, self.choices, self.answer])
        return hashlib.sha256(plain.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """One file: a task by the name of the file."""

    name: str
    items: tuple[Question, ...]


def read_questions(paths: Sequence[Path]) -> tuple[Questions, ...]:
    """Read files of questions.

    Raises:
        RecipeError: Two files would be tasks of one name.
        CheckpointError: A file is missing, empty, or a line is not a question.
    """
    names = [path.stem for path in paths]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError("--pairs", f"two files are called {name}", "rename one")
    return tuple(Questions(name=path.stem, items=_read(path)) for path in paths)


def _read(path: Path) -> tuple[Question, ...]:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        fact = f"byte {error.start} is not UTF-8"
        raise CheckpointError(path, fact, "convert the file to UTF-8 text") from error
    except OSError as error:
        reason = (error.strerror or "cannot be read").lower()
        raise CheckpointError(path, reason, "name a file of questions") from error
    lines = enumerate(text.split("\n"), start=1)
    found = tuple(_question(line, f"{path}:{number}") for number, line in lines if line.strip())
    if not found:
        raise CheckpointError(path, "the file holds no question", _REMEDY)
    return found


def _question(line: str, name: str) -> Question:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(name, "the line is not JSON", "give one object a line") from error
    if not isinstance(record, dict):
        raise CheckpointError(name, "the line is not a JSON object", _REMEDY)
    if "good" in record or "bad" in record:
        record = {
            "prompt": record.get("prompt", ""),
            "choices": [record.get("good"), record.get("bad")],
            "answer": 0,
        }
    return _checked(record, name)


def _checked(record: dict[str, Any], name: str) -> Question:
    prompt, choices, answer = (record.get(key) for key in ("prompt", "choices", "answer"))
    if not isinstance(prompt, str) or not isinstance(choices, list):
        raise CheckpointError(name, "the line is no question", _REMEDY)
    if len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):  # noqa: PLR2004
        raise CheckpointError(name, "choices are not two or more texts", _REMEDY)
    if len(set(choices)) < len(choices):
        raise CheckpointError(name, "two choices are the same", "make them differ")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        fact = f"the answer is not a number from 0 to {len(choices) - 1}"
        raise CheckpointError(name, fact, "count choices from 0")
    if any("\ud800" <= c <= "\udfff" for text in (prompt, *choices) for c in text):
        raise CheckpointError(name, "a text holds half a surrogate pair", "repair the line")
    return Question(name=name, prompt=prompt, choices=tuple(choices), answer=answer)
