"""Which files stand beside the output: the donor's, and the tokenizer's from its source."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.jsonfile import read_json_object, read_small_file
from surgery.errors import RecipeError
from surgery.vocabulary.config import Move, moved, resized
from surgery.vocabulary.read import tokenizer_files
from surgery.vocabulary.tables import section
from surgery.vocabulary.template import FILE, TEMPLATE_FILES, Template, template_files
from surgery.vocabulary.union import Union

GENERATION = "generation_config.json"


@dataclass(frozen=True, slots=True)
class Files:
    """Files beside the weights: the donor's own, and those made anew by name."""

    carried: tuple[Path, ...]
    written: dict[str, bytes]
    notes: tuple[str, ...] = ()


def choose_files(
    models: Sequence[Checkpoint],
    *,
    donor: int,
    source: int,
    template: Template | None,
    union: Union | None = None,
) -> Files:
    """Put the output's files together.

    All of the tokenizer's files come from `source`, the others from `donor`; a union replaces
    the tokenizer's and leaves out those that would contradict it.

    Raises:
        RecipeError: the tokenizer of another model than the donor needs its own Python code.
    """
    carried, written = models[donor].carried, dict[str, bytes]()
    if source != donor:
        theirs = tokenizer_files(models[source])
        _refuse_code(models[source], theirs)
        carried = tuple(p for p in carried if p not in tokenizer_files(models[donor]))
        root = models[source].root
        written = {str(p.relative_to(root)): read_small_file(p) for p in theirs}
    notes: list[str] = []
    if union is not None:
        carried = tuple(p for p in carried if p.name not in union.obsolete)
        written = {k: v for k, v in written.items() if k not in union.obsolete} | {**union.files}
        notes += [f"{name} is left out: tokenizer.json has more" for name in union.obsolete]
    if template is not None and template.text is not None:
        carried, written = _with_template(template.text, carried, written, models[donor].root)
    return Files(carried, written, tuple(notes))


def _refuse_code(model: Checkpoint, files: Sequence[Path]) -> None:
    settings = next((p for p in files if p.name == "tokenizer_config.json"), None)
    if settings is not None and read_json_object(settings).get("auto_map"):
        fact = f"the tokenizer of {model.ref} needs its own Python code"
        raise RecipeError("tokenizer.source", fact, "take that model as the base")


def _with_template(
    text: str, carried: tuple[Path, ...], written: dict[str, bytes], root: Path
) -> tuple[tuple[Path, ...], dict[str, bytes]]:
    names = {str(path.relative_to(root)): path for path in carried}
    name = "tokenizer_config.json"
    settings: dict[str, Any] = {}
    if name in written:
        settings = json.loads(written[name])
    elif name in names:
        settings = read_json_object(names[name])
    new = template_files(text, settings, {*names, *written})
    kept = tuple(path for name, path in names.items() if name not in TEMPLATE_FILES)
    return kept, {k: v for k, v in written.items() if k != FILE} | new


def new_configs(
    donor: Checkpoint, source: Checkpoint | None, *, size: int, move: Move
) -> tuple[dict[str, Any] | None, dict[str, bytes], list[str]]:
    """Return the donor's config and generation config with new size and ids, and what was lost.

    Args:
        source: the model whose tokenizer is taken whole, where it is not the donor: what it says
            of bos, eos and pad goes with its tokenizer.
        move: new id of one of the donor's, None where there is none.
    """
    lost: list[str] = []
    config, written = donor.config, dict[str, bytes]()
    if config is not None:
        theirs = source.config if source else None
        config = resized(moved(config, move, lost, own=theirs), section(config), size)
    told = _generation(donor)
    if told:
        own = _generation(source) if source else None
        new = moved(told, move, lost, own=own)
        if new != told:
            text = json.dumps(new, indent=2, ensure_ascii=False)
            written[GENERATION] = text.encode() + b"\n"
    return config, written, list(dict.fromkeys(lost))


def _generation(model: Checkpoint) -> Mapping[str, Any]:
    path = next((path for path in model.carried if path.name == GENERATION), None)
    return read_json_object(path) if path else {}
