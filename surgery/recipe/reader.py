"""Read YAML without trust: plain values, and the line that each stands on."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from surgery.checkpoint.header import open_regular, quoted
from surgery.errors import RecipeError

MAX_BYTES = 4 << 20
MAX_VALUES = 50_000  # after aliases are followed
MAX_DEPTH = 60
Key = str | int
PLAIN = {
    f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq")
}
MERGE = "tag:yaml.org,2002:merge"


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One document: its value, and where the parts of it were written.

    Attributes:
        source: the file as the user named it; empty where there is none.
        lines: per path of keys the line, counted from 1.
        flags: per dotted path the option that it was written as, where there is no file.
    """

    value: dict[str, Any]
    source: str = ""
    lines: Mapping[tuple[Key, ...], int] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)

    def place(self, *path: Key) -> str:
        """Tell where something was written: `merge.yml, line 4, models[0].parameters.t`."""
        for end in range(len(path), 0, -1) if self.flags else ():
            if (flag := self.flags.get(dotted(path[:end]))) is not None:
                return flag
        known = next((path[:n] for n in range(len(path), -1, -1) if path[:n] in self.lines), None)
        line = f"line {self.lines[known]}" if known is not None and path else ""
        told = (self.source, line, dotted(path))
        return ", ".join(part for part in told if part) or "the recipe"


def dotted(path: Iterable[Key]) -> str:
    """Write a path of keys as `models[0].parameters.t`."""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else key
    return text


def read_documents(path: Path) -> tuple[Document, ...]:
    """Read a YAML file of one or more documents, each a table.

    Raises:
        RecipeError: unreadable, broken or empty, a key twice, a key that is no word, a value
            that is neither number, word, truth value, list nor table, or aliases that multiply.
    """
    return parse_documents(_read_text(path), source=str(path))


def parse_documents(text: str, *, source: str) -> tuple[Document, ...]:
    """Parse YAML text; see `read_documents`."""
    try:
        nodes = [node for node in yaml.compose_all(text, Loader=yaml.SafeLoader) if node]
        found = tuple(_document(node, source) for node in nodes)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}, line {mark.line + 1}" if mark else source
        fact = f"is not YAML ({error.problem or error.context})"
        raise RecipeError(place, fact, "check indentation, brackets and quotes") from error
    except yaml.YAMLError as error:
        fact = f"is not YAML ({' '.join(str(error).split())[:120]})"
        raise RecipeError(source, fact, "save it as plain text") from error
    except RecursionError as error:
        raise RecipeError(source, "is nested too deeply", "no recipe needs that") from error
    if not found:
        raise RecipeError(source, "is empty", "write at least merge_method and models")
    return found


def _read_text(path: Path) -> str:
    import os

    from surgery.errors import CheckpointError

    try:
        with os.fdopen(open_regular(path), "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except CheckpointError as error:
        raise RecipeError(path, error.fact, "name a recipe, a YAML file") from error
    if len(raw) > MAX_BYTES:
        raise RecipeError(path, f"is larger than {MAX_BYTES >> 20} MiB", "it is no recipe")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fact = f"is not UTF-8 (byte {error.start})"
        raise RecipeError(path, fact, "name a recipe, a YAML file") from error


def _document(node: yaml.Node, source: str) -> Document:
    lines: dict[tuple[Key, ...], int] = {}
    reader = _Reader(source, lines)
    value = reader.read(node, ())
    if not isinstance(value, dict):
        fact = f"holds {_kind(value)}, not a table of keys"
        raise RecipeError(f"{source}, line {_line(node)}", fact, "write for instance merge_method:")
    return Document(value=value, source=source, lines=lines)


class _Reader:
    """Turns nodes into values, counting them as aliases are followed."""

    def __init__(self, source: str, lines: dict[tuple[Key, ...], int]) -> None:
        self.source, self.lines = source, lines
        self.count = 0
        self.scalars = yaml.constructor.SafeConstructor()

    def read(self, node: yaml.Node, path: tuple[Key, ...]) -> Any:  # noqa: ANN401 - any plain value
        self.count += 1
        if self.count > MAX_VALUES or len(path) > MAX_DEPTH:
            fact = "is nested too deeply" if len(path) > MAX_DEPTH else "multiplies by its aliases"
            raise RecipeError(self.source, fact, "write the values out")
        self.lines.setdefault(path, _line(node))
        if node.tag not in PLAIN:
            kind = node.tag.rpartition(":")[2].lstrip("!")
            value = quoted(str(node.value)) if isinstance(node, yaml.ScalarNode) else "it"
            place = f"{self.source}, line {_line(node)}, {dotted(path)}"
            raise RecipeError(place, f"{value} is read as a {kind}", "put words in quotes")
        if isinstance(node, yaml.MappingNode):
            return {key: self.read(value, (*path, key)) for key, value in self.entries(node, path)}
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*path, n)) for n, item in enumerate(node.value)]
        return self.scalar(node, path)

    def entries(
        self, node: yaml.MappingNode, path: tuple[Key, ...]
    ) -> Iterator[tuple[str, yaml.Node]]:
        """Yield keys and values, those of `<<` behind the table's own, each key once."""
        own: dict[str, yaml.Node] = {}
        merged: list[yaml.MappingNode] = []
        for key, value in node.value:
            if key.tag == MERGE:
                merged += self.merged(value, path)
                continue
            name = self.key(key)
            if name in own:
                fact = f"the key {quoted(name)} stands twice"
                raise RecipeError(f"{self.source}, line {_line(key)}", fact, "keep one of them")
            own[name] = value
            self.lines[(*path, name)] = _line(key)
        for table in merged:
            if len(path) > MAX_DEPTH:
                raise RecipeError(self.source, "is nested too deeply", "write the values out")
            for name, value in self.entries(table, (*path, "<<")):
                own.setdefault(name, value)
        self.count += len(own)
        yield from own.items()

    def merged(self, node: yaml.Node, path: tuple[Key, ...]) -> list[yaml.MappingNode]:
        tables = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not all(isinstance(table, yaml.MappingNode) for table in tables):
            place = f"{self.source}, line {_line(node)}, {dotted((*path, '<<'))}"
            raise RecipeError(place, "merges something that is no table", "write it out")
        return list(tables)

    def key(self, node: yaml.Node) -> str:
        if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:str":
            return str(node.value)
        told = (
            f"the key {quoted(str(node.value))}" if isinstance(node, yaml.ScalarNode) else "a key"
        )
        place = f"{self.source}, line {_line(node)}"
        raise RecipeError(place, f"{told} is no word", "put it in quotes")

    def scalar(self, node: yaml.Node, path: tuple[Key, ...]) -> Any:  # noqa: ANN401
        place = f"{self.source}, line {_line(node)}, {dotted(path)}"
        try:
            return self.scalars.construct_object(node)
        except ValueError as error:  # an integer of thousands of digits, a number of odd spelling
            raise RecipeError(place, f"{quoted(str(node.value))} is no number") from error


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _kind(value: object) -> str:
    return "a list" if isinstance(value, list) else f"{quoted(str(value))}"
