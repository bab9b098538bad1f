"""Text files as documents: a file is one, except `.jsonl`, where each line is one."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import CheckpointError, RecipeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text to score.

    Attributes:
        domain: The file it came from, as the user wrote it.
        name: The file, and the line where the file holds many.
        text: The text as it was decoded, line ends untouched.
    """

    domain: str
    name: str
    text: str


def read_documents(paths: Sequence[Path]) -> tuple[Document, ...]:
    """Read every document of every file, in order.

    A `.jsonl` file holds one JSON object a line, with the text under "text"; any other file is
    one document. Everything is UTF-8.

    Raises:
        RecipeError: No file is named, or one is named twice.
        CheckpointError: A file is missing, empty, not UTF-8, or a line is not what it should be.
    """
    if not paths:
        raise RecipeError("--text", "no text is named", "give one or more files")
    for place, path in enumerate(paths):
        if path in paths[:place]:
            raise RecipeError("--text", f"{path} is named twice", "name each file once")
    return tuple(document for path in paths for document in _read(path))


def _read(path: Path) -> Iterator[Document]:
    text = _decode(path)
    if path.suffix.lower() != ".jsonl":
        yield Document(domain=str(path), name=str(path), text=text)
        return
    # Only \n ends a line of JSON; splitlines would also cut at separators inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            name = f"{path}:{number}"
            yield Document(domain=str(path), name=name, text=_text_of(line, name))


def _decode(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            path, f"byte {error.start} is not UTF-8", "convert the file to UTF-8 text"
        ) from error
    except OSError as error:
        reason = (error.strerror or "cannot be read").lower()
        raise CheckpointError(path, reason, "name a file of text") from error
    if not text.strip():
        raise CheckpointError(path, "the file holds no text", "name a file of text")
    return text


def _text_of(line: str, name: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(name, "the line is not JSON", "give one object a line") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise CheckpointError(name, f'no string under "text" ({_found(record)})', "add one")
    if not text:
        raise CheckpointError(name, "the text is empty", "remove the line")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise CheckpointError(name, "the text holds half a surrogate pair", "repair the line")
    return text


def _found(record: object) -> str:
    if not isinstance(record, dict):
        return f"the line is a JSON {type(record).__name__}"
    return "keys: " + (", ".join(list(record)[:6]) or "none")
