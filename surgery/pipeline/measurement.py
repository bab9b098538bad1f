"""Results of measurements: JSON files, and what each of them answers."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

from surgery.checkpoint import stamp
from surgery.pipeline.folder import Folder
from surgery.pipeline.output import find_output
from surgery.pipeline.state import write_file
from surgery.provenance import tool_version

SMALL = 64 << 20  # bytes of a file that is told by what it holds, a larger one by its stamp


def question(what: str, words: Iterable[str], outputs: Mapping[str, Path]) -> str:
    """Return a digest of all that decides a measurement.

    Args:
        words: arguments; of those that name a file or directory, what it holds counts too.
        outputs: the used steps' outputs, or their stand-ins.
    """
    given = list(words)
    used = sorted((name, _contents(path)) for name, path in outputs.items())
    parts = [part for word in given for part in re.split("[=+]", word) if part not in outputs]
    files = [[part, _file(Path(part))] for part in parts]
    versions = [tool_version(), version("torch")]
    told = [what, given, used, files, versions]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _contents(path: Path) -> str:
    output = find_output(path)
    return output.contents if output else _file(path)


def _file(path: Path) -> str:
    """Identify a file by its bytes, a large one or a directory by sizes and times."""
    try:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.is_file())
            return json.dumps([[p.name, stamp(p)[2:]] for p in inside])
        if path.stat().st_size > SMALL:
            return json.dumps(stamp(path)[2:])
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError):  # no path at all
        return ""


def result_file(folder: Folder, name: str) -> Path:
    """Return where the result of a measurement is kept."""
    return folder.path / f"{name}.json"


def is_answered(folder: Folder, name: str, asked: str) -> bool:
    """Whether the result is there, as it was written, and answers what is asked."""
    try:
        found = hashlib.sha256(result_file(folder, name).read_bytes()).hexdigest()
    except OSError:
        return False
    return folder.state.results.get(name) == {"asked": asked, "sha256": found}


def keep_result(folder: Folder, name: str, asked: str, text: str) -> Path:
    """Write the result of a measurement.

    Raises:
        StepError: the disk refuses.
    """
    path, data = result_file(folder, name), text.encode()
    write_file(path, data)
    told = {"asked": asked, "sha256": hashlib.sha256(data).hexdigest()}
    folder.state.results[name] = told
    folder.save()
    return path
