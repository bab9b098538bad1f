"""Refuse files of text that cannot be trained on or measured, before anything heavy is loaded."""

import codecs
from collections.abc import Iterable
from pathlib import Path

from surgery.errors import CheckpointError
from surgery.recover.sources import Reader, Source

PROBE = 1 << 20  # bytes of a file of text that are looked at


def check_readable(data: Iterable[Source], held_out: Iterable[Path] = ()) -> None:
    """Refuse what is not there, holds no text, or whose first document cannot be read.

    Of data, a first document or MiB is read, and nothing of parquet and of the hub; held-out text
    is read whole.

    Raises:
        CheckpointError: the first such file.
    """
    from surgery.evaluate.documents import read_documents  # with numpy

    for source in data:
        if source.found_kind != "hub":
            _check(source)
    for path in held_out:
        _check_there(path)
        read_documents([path])


def _check(source: Source) -> None:
    path = Path(source.path)
    _check_there(path)
    if source.found_kind == "jsonl":
        holds = next(Reader(source).read(), None) is not None
    else:
        holds = source.found_kind == "parquet" or _holds_text(path)
    if not holds:
        raise CheckpointError(path, "the file holds no text", "name a file of text")


def _check_there(path: Path) -> None:
    if not path.exists():
        raise CheckpointError(path, "does not exist")
    if path.is_dir():
        raise CheckpointError(path, "is a directory", "name a file of text")


def _holds_text(path: Path) -> bool:
    """Return whether there is more than white space, as far as a first piece tells."""
    try:
        with path.open("rb") as file:
            raw = file.read(PROBE)
        text = codecs.getincrementaldecoder("utf-8")().decode(raw, final=len(raw) < PROBE)
    except UnicodeDecodeError as error:
        fact = f"byte {error.start} is not UTF-8"
        raise CheckpointError(path, fact, "convert the file to UTF-8 text") from error
    except OSError as error:
        reason = (error.strerror or "cannot be read").lower()
        raise CheckpointError(path, reason, "name a file of text") from error
    return len(raw) == PROBE or bool(text.strip())
