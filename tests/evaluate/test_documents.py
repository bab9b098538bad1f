"""Reading text: what a document is, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery.errors import CheckpointError, RecipeError
from surgery.evaluate.documents import read_documents


def test_a_text_file_is_one_document_with_its_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_bytes(b"x = 1\r\n\r\ny = 2\n")
    (document,) = read_documents([path])
    assert (document.domain, document.name) == (str(path), str(path))
    assert document.text == "x = 1\r\n\r\ny = 2\n"


def test_each_line_of_jsonl_is_a_document_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\\u2028still one"}\n\n{"text": "two", "id": 2}\n', "utf-8")
    first, second = read_documents([path])
    assert (first.text, second.text) == ("one\u2028still one", "two")
    assert (first.name, second.name) == (f"{path}:1", f"{path}:3")
    assert first.domain == second.domain == str(path)


@pytest.mark.parametrize(
    ("name", "content", "fact"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\t\n", "holds no text"),
        ("a.txt", b"abc\xff", "byte 3 is not UTF-8"),
        ("a.jsonl", b"\n\n", "holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{"body": 1, "id": 2}', "a.jsonl:2: no string under"),
        ("a.jsonl", b'{"text": 3}', "no string under"),
        ("a.jsonl", b'["x"]', "the line is a JSON list"),
        ("a.jsonl", b'{"text": ', "the line is not JSON"),
        ("a.jsonl", b"[" * 100_000, "the line is not JSON"),
        ("a.jsonl", b'{"text": ""}', "the text is empty"),
        ("a.jsonl", rb'{"text": "\ud800"}', "half a surrogate pair"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, name: str, content: bytes, fact: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=fact) as caught:
        read_documents([path])
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(("name", "fact"), [("absent.txt", "no such file"), ("", "directory")])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str, fact: str) -> None:
    with pytest.raises(CheckpointError, match=fact):
        read_documents([tmp_path / name])


def test_no_file_and_a_file_named_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no text is named"):
        read_documents([])
    path = tmp_path / "a.txt"
    path.write_text("x")
    with pytest.raises(RecipeError, match="named twice"):
        read_documents([path, path])
