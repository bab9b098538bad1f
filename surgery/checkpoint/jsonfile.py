"""Read the small JSON files beside the weights, trusting nothing in them."""

import json
import os
from pathlib import Path
from typing import Any

from surgery.checkpoint.header import open_regular, repeated
from surgery.errors import CheckpointError

MAX_JSON = 512 << 20  # bytes; the largest tokenizer.json in use has about 40 MB


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file whose top level is an object.

    `Infinity` and `NaN` pass, as transformers writes them into configs.

    Raises:
        CheckpointError: unreadable, too large, not UTF-8, not JSON, nested too deeply, a key
            given twice, or no object at the top.
    """
    raw = read_small_file(path)
    if raw.startswith(b"version https://git-lfs"):
        fact = "is a Git LFS pointer, not the file itself"
        raise CheckpointError(path, fact, "run `git lfs pull`")
    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique(path))
    except UnicodeDecodeError as error:
        raise CheckpointError(path, f"is not UTF-8 (byte {error.start})") from error
    except RecursionError as error:
        raise CheckpointError(path, "is nested too deeply") from error
    except json.JSONDecodeError as error:
        fact = f"is not JSON ({error.msg}, line {error.lineno} column {error.colno})"
        raise CheckpointError(path, fact, "restore the file") from error
    except ValueError as error:  # an integer of thousands of digits
        raise CheckpointError(path, "holds a number with too many digits") from error
    if not isinstance(document, dict):
        raise CheckpointError(path, "is not a JSON object", "restore the file")
    return document


def read_small_file(path: Path) -> bytes:
    """Read a whole file of at most 512 MiB."""
    fd = open_regular(path)
    with os.fdopen(fd, "rb") as file:
        if os.fstat(fd).st_size > MAX_JSON:
            raise CheckpointError(path, f"is larger than {MAX_JSON} bytes", "it is no JSON file")
        return file.read()


def _unique(path: Path) -> Any:  # noqa: ANN401 - the hook's type is json's own
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(items)
        if len(out) != len(items):
            fact = f"gives the key {repeated(items)} twice"
            raise CheckpointError(path, fact, "keep one of them")
        return out

    return pairs
