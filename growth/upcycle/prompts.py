"""Prompts that tell what each expert is for, read from YAML or JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from surgery.checkpoint.jsonfile import read_small_file
from surgery.errors import CheckpointError, RecipeError

FORM = "write {expert: {positive: [...], negative: [...]}}, or a list in the experts' order"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """What one expert is for, and what it is not for."""

    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()


def read_prompts(path: Path, names: Sequence[tuple[str, ...]]) -> tuple[Prompts, ...]:
    """Read each expert's prompts, in the experts' order.

    The file is a table by expert or a list in their order; an entry is a list of prompts, or a
    table of `positive` and `negative` ones.

    Args:
        names: what each expert may be called: its name, and as the user typed it.

    Raises:
        CheckpointError: the file cannot be read.
        RecipeError: it is of another form, or an expert has no entry or two.
    """
    document = _parsed(path)
    if isinstance(document, list):
        if len(document) != len(names):
            fact = f"has {len(document)} entries for {len(names)} experts"
            raise RecipeError(path, fact, FORM)
        return tuple(_entry(path, str(n), entry) for n, entry in enumerate(document))
    if not isinstance(document, dict):
        raise RecipeError(path, "holds neither a table nor a list", FORM)
    _check_keys(path, document, names)
    return tuple(_of_expert(path, document, each) for each in names)


def _parsed(path: Path) -> Any:  # noqa: ANN401 - whatever the file holds
    import yaml

    try:
        text = read_small_file(path).decode()
        return yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        what = str(error).splitlines()[0]
        raise CheckpointError(path, f"cannot be read as YAML or JSON ({what})", FORM) from error


def _check_keys(path: Path, document: Mapping[str, Any], names: Sequence[tuple[str, ...]]) -> None:
    known = [name for each in names for name in each]
    unknown = next((str(key) for key in document if key not in known), None)
    if unknown is not None:
        close = get_close_matches(unknown, known, n=1) or [names[0][0]]
        fact = f"has prompts for {unknown!r}, which is no expert"
        raise RecipeError(path, fact, f"did you mean {close[0]!r}?")


def _of_expert(path: Path, document: Mapping[str, Any], names: tuple[str, ...]) -> Prompts:
    found = [name for name in dict.fromkeys(names) if name in document]
    if len(found) != 1:
        fact = f"has {len(found) or 'no'} entries for the expert {names[0]!r}"
        raise RecipeError(path, fact, FORM)
    return _entry(path, found[0], document[found[0]])


def _entry(path: Path, name: str, entry: object) -> Prompts:
    if isinstance(entry, list):
        entry = {"positive": entry}
    if not isinstance(entry, dict) or not entry.keys() <= {"positive", "negative"}:
        raise RecipeError(path, f"the entry {name!r} is of another form", FORM)
    lists = {key: entry.get(key) or [] for key in ("positive", "negative")}
    for key, prompts in lists.items():
        sound = isinstance(prompts, list) and all(isinstance(p, str) and p for p in prompts)
        if not sound or (key == "positive" and not prompts):
            fact = f"{key} prompts of {name!r} are no list of texts"
            raise RecipeError(path, fact, FORM)
    return Prompts(positive=tuple(lists["positive"]), negative=tuple(lists["negative"]))
