"""YAML without trust: values and their lines, and one sentence for everything else."""

import os

import pytest

from surgery.errors import RecipeError
from surgery.recipe.reader import MAX_BYTES, parse_documents, read_documents


def read(text):
    return parse_documents(text, source="x.yml")


def test_values_come_with_their_lines():
    (document,) = read("a: 1\nb:\n  - c: [0.5, true]\n  - text\n")
    assert document.value == {"a": 1, "b": [{"c": [0.5, True]}, "text"]}
    assert document.place("b", 0, "c") == "x.yml, line 3, b[0].c"
    assert document.place("b", 0, "c", 1) == "x.yml, line 3, b[0].c[1]"
    assert document.place("b", 7, "d") == "x.yml, line 2, b[7].d"
    assert document.place() == "x.yml"


def test_a_file_may_hold_several_documents():
    one, two = read("a: 1\n---\nb: 2\n")
    assert (one.value, two.value) == ({"a": 1}, {"b": 2})
    assert two.place("b") == "x.yml, line 3, b"


def test_aliases_and_merge_keys_are_followed():
    text = "base: &b {x: 1, y: 2}\none: *b\ntwo: {<<: *b, y: 3}\nlist: {<<: [*b, {z: 4}]}\n"
    (document,) = read(text)
    assert document.value["one"] == {"x": 1, "y": 2}
    assert document.value["two"] == {"x": 1, "y": 3}
    assert document.value["list"] == {"x": 1, "y": 2, "z": 4}


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefg", "bcdefgh", strict=True)
)
NESTED_MERGE = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
REFUSED = {
    "nothing": ("", "x.yml: is empty"),
    "a comment": ("# nothing\n", "x.yml: is empty"),
    "a word": ("hello\n", "x.yml, line 1: holds 'hello', not a table"),
    "a list": ("\n- a\n", "x.yml, line 2: holds a list, not a table"),
    "a bracket": ("a: [1\nb: 2\n", "x.yml, line 2: is not YAML"),
    "a tab": ("a:\n\tb: 1\n", "x.yml, line 2: is not YAML"),
    "two colons": ("a: b: c\n", "x.yml, line 1: is not YAML"),
    "a control character": ("a: \x01\n", "x.yml: is not YAML"),
    "an unknown alias": ("a: *b\n", "x.yml, line 1: is not YAML"),
    "a key twice": ("a: 1\nb: 2\na: 3\n", "x.yml, line 3: the key 'a' stands twice"),
    "a number as key": ("1: a\n", "x.yml, line 1: the key '1' is no word"),
    "a switch as key": ("on: a\n", "x.yml, line 1: the key 'on' is no word"),
    "a list as key": ("[a]: b\n", "x.yml, line 1: a key is no word"),
    "a date": ("a: 2024-01-01\n", "x.yml, line 1, a: '2024-01-01' is read as a timestamp"),
    "an object": ("a: !!python/object:os.system x\n", "x.yml, line 1, a: 'x' is read as a"),
    "a set": ("a: !!set {x}\n", "x.yml, line 1, a: it is read as a set"),
    "a merge of a word": ("a: {<<: x}\n", "x.yml, line 1, a.<<: merges something that is no table"),
    "a number of many digits": (f"a: {'9' * 5000}\n", "x.yml, line 1, a:"),
    "aliases that multiply": (BOMB, "x.yml: multiplies by its aliases"),
    "deep lists": ("a: " + "[" * 500 + "]" * 500 + "\n", "x.yml: is nested too deeply"),
    "very deep lists": ("a: " + "[" * 50_000, "x.yml"),
    "an alias within itself": ("a: &a [*a]\n", "x.yml: is nested too deeply"),
    "a merge of itself": ("a: &a {<<: *a}\n", "x.yml"),
    "merges that multiply": (NESTED_MERGE, "x.yml: multiplies by its aliases"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_recipe_is_told_in_one_sentence(name):
    text, wanted = REFUSED[name]
    with pytest.raises(RecipeError) as caught:
        read(text)
    assert str(caught.value).startswith(wanted)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bytes").write_bytes(b"a: \xff\xfe")
    (tmp_path / "huge").write_bytes(b"#" * (MAX_BYTES + 1))
    wanted = {
        "missing": "cannot be opened",
        "pipe": "is not a regular file",
        ".": "is not a regular file",
        "bytes": "is not UTF-8",
        "huge": "is larger than 4 MiB",
    }
    for name, fact in wanted.items():
        with pytest.raises(RecipeError, match=fact) as caught:
            read_documents(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "x.yml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_documents(tmp_path / "x.yml")[0].value == {"a": 1}
