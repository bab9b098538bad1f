"""Where documents come from: text, JSON lines, parquet, data sets of the hub.

A record is a text under "text", or a chat under "messages". Nothing is tokenized here.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from surgery.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from hashlib import _Hash

Kind = Literal["text", "jsonl", "parquet", "hub"]
HUB = "hf://datasets/"
COLUMNS = ("messages", "text", "tools")
_KINDS: Mapping[str, Kind] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True, slots=True)
class Source:
    """A file, or a data set of the hub as `hf://datasets/OWNER/NAME[@REVISION][:SPLIT]`.

    Attributes:
        path: as the user wrote it.
        share: None for the data itself; of replay, the share of rows that all replay sources
            have together, the same for each of them.
        kind: how to read it; None goes by the name. A file of kind "text" is one document.
    """

    path: str | Path
    share: float | None = None
    kind: Kind | None = None

    @property
    def found_kind(self) -> Kind:
        """How it is read."""
        if self.kind is not None:
            return self.kind
        if str(self.path).startswith(HUB):
            return "hub"
        return _KINDS.get(Path(self.path).suffix.lower(), "text")


@dataclass(frozen=True, slots=True)
class Record:
    """One document before tokenization: a text, or a chat.

    Attributes:
        line: of the file, or the number of the record, from 1.
        name: the place to tell a user.
        text: None where it is a chat.
        messages: with "role" and "content", as chat templates take them.
        tools: what the template is told of tools, if anything.
    """

    line: int
    name: str
    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Any, ...] | None = None


@dataclass(slots=True)
class Reader:
    """Reads one source once, and digests what it reads.

    Attributes:
        empty: records without text so far.
    """

    source: Source
    empty: int = 0
    _hash: "_Hash" = field(default_factory=hashlib.sha256)

    @property
    def digest(self) -> str:
        """SHA-256 of the file; of a data set of the hub, of its records as JSON lines."""
        return self._hash.hexdigest()

    def read(self) -> Iterator[Record]:
        """Yield the documents, empty ones left out and counted.

        Raises:
            CheckpointError: the file cannot be read, or a record is not what it should be.
            RecipeError: a package that reads this kind is not installed.
        """
        kinds = {"text": self._text, "jsonl": self._lines, "parquet": self._parquet}
        for record in kinds.get(self.source.found_kind, self._hub)():
            if record.messages or (record.text or "").strip():
                yield record
            else:
                self.empty += 1

    def _text(self) -> Iterator[Record]:
        raw = _bytes_of(Path(self.source.path))
        self._hash.update(raw)
        yield Record(1, str(self.source.path), text=_decode(raw, str(self.source.path)))

    def _lines(self) -> Iterator[Record]:
        path = Path(self.source.path)
        try:
            with path.open("rb") as file:
                for number, raw in enumerate(file, start=1):
                    self._hash.update(raw)
                    name = f"{path}:{number}"
                    line = _decode(raw, name)
                    if line.strip():
                        yield _record(_parse(line, name), number, name)
        except OSError as error:
            raise _unreadable(path, error) from error

    def _parquet(self) -> Iterator[Record]:
        path = Path(self.source.path)
        parquet = _extra("pyarrow.parquet", str(path))
        try:
            with path.open("rb") as file:
                while piece := file.read(1 << 20):
                    self._hash.update(piece)
            table = parquet.ParquetFile(path)
        except OSError as error:
            raise _unreadable(path, error) from error
        except ValueError as error:  # all of pyarrow's own errors are
            raise CheckpointError(path, "is not a parquet file", "name one that is") from error
        columns = _columns(table.schema_arrow.names, str(path))
        batches = table.iter_batches(columns=columns)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from _numbered(rows, str(path))

    def _hub(self) -> Iterator[Record]:
        name, revision, split = split_hub_name(str(self.source.path))
        datasets = _extra("datasets", str(self.source.path))
        with _without_bars(datasets):
            try:
                found = datasets.load_dataset(name, revision=revision, split=split)
            except Exception as error:
                words = " ".join(str(error).split())[:300]
                fact = f"the data set cannot be loaded ({type(error).__name__}: {words})"
                raise CheckpointError(self.source.path, fact) from error
        columns = _columns(found.column_names, str(self.source.path))
        yield from _numbered(self._digested(found.select_columns(columns)), name)

    def _digested(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        for row in rows:
            self._hash.update(json.dumps(row, sort_keys=True).encode() + b"\n")
            yield row


def split_hub_name(ref: str) -> tuple[str, str | None, str]:
    """Return name, revision and split of a data set."""
    name, _, split = ref.removeprefix(HUB).partition(":")
    name, _, revision = name.partition("@")
    return name, revision or None, split or "train"


def _extra(module: str, place: str) -> Any:  # noqa: ANN401 - a module
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        fact = "needs the datasets package, which is not installed"
        raise RecipeError(place, fact, "pip install 'model-surgery[data]'") from error


@contextmanager
def _without_bars(datasets: Any) -> Iterator[None]:  # noqa: ANN401 - a module
    """Keep the package from writing on the terminal; put its setting back afterwards."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _columns(names: Iterable[str], place: str) -> list[str]:
    there = list(names)
    found = [name for name in COLUMNS if name in there]
    if not {"messages", "text"} & set(found):
        fact = f'has no column "text" or "messages" (columns: {", ".join(there[:6])})'
        raise CheckpointError(place, fact, "rename one")
    return found


def _numbered(rows: Iterable[Mapping[str, Any]], place: str) -> Iterator[Record]:
    for number, row in enumerate(rows, start=1):
        yield _record(row, number, f"{place}:{number}")


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    reason = (error.strerror or "cannot be read").lower()
    return CheckpointError(path, reason, "name a file of text")


def _decode(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        fact = f"byte {error.start} is not UTF-8"
        raise CheckpointError(name, fact, "convert the file to UTF-8 text") from error


def _parse(line: str, name: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(name, "the line is not JSON", "give one object a line") from error


def _record(found: object, line: int, name: str) -> Record:
    if not isinstance(found, Mapping):
        fact = f"the line is a JSON {type(found).__name__}"
        raise CheckpointError(name, fact, 'give an object with "text" or "messages"')
    if found.get("messages") is not None:
        return _chat(found, line, name)
    text = found.get("text")
    if not isinstance(text, str):
        keys = ", ".join(list(found)[:6]) or "none"
        fact = f'no string under "text" and no "messages" (keys: {keys})'
        raise CheckpointError(name, fact, "add one")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise CheckpointError(name, "the text holds half a surrogate pair", "repair the line")
    return Record(line, name, text=text)


def _chat(found: Mapping[str, Any], line: int, name: str) -> Record:
    messages, tools = found["messages"], found.get("tools")
    sound = isinstance(messages, list) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages
    )
    if not sound:
        fact = '"messages" is not a list of objects with "role" and "content"'
        raise CheckpointError(name, fact, "repair the line")
    return Record(line, name, messages=tuple(messages), tools=tuple(tools) if tools else None)
