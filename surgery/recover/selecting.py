"""The selection of a run: made once, and the same when the run goes on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.evaluate.load import Loaded
from surgery.recover.ask import Ask
from surgery.recover.corpus import Corpus
from surgery.recover.distributed import World
from surgery.recover.select import Selection, select
from surgery.recover.sharded import agreed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "selection.json"


def select_documents(
    ask: Ask,
    world: World,
    corpus: Corpus,
    *,
    tokenizer: "PreTrainedTokenizerBase",
    student: Loaded,
    parent: Loaded,
) -> Selection:
    """Return which documents to train on: what the run kept, or what the first process finds.

    Raises:
        RecipeError, TrainError: as `select`.
    """
    settings = ask.settings

    def act() -> dict[str, Any]:
        kept = _kept(ask, corpus)
        if kept is not None:
            return dict(kept)
        found = select(
            corpus,
            tokenizer,
            student,
            parent,
            share=settings.select_share,
            seed=settings.seed,
            context=settings.context,
            batch_tokens=max(settings.micro_tokens, settings.context),
        )
        return found.as_dict()

    return Selection.from_dict(agreed(world, act))


def keep_selection(ask: Ask, selection: Selection | None, corpus: Corpus) -> None:
    """Keep a selection in the run's folder, beside what it follows from."""
    if selection is not None:
        told = {"of": _of(ask, corpus), "selection": selection.as_dict()}
        (ask.folder / FILE).write_text(json.dumps(told))


def _kept(ask: Ask, corpus: Corpus) -> Mapping[str, Any] | None:
    """Return the selection of the run that goes on, if it is of the same ask."""
    path: Path = ask.folder / FILE
    if not ask.resume or not path.is_file():
        return None
    try:
        told = json.loads(path.read_text())
        found: Mapping[str, Any] = told["selection"]
    except (ValueError, KeyError):
        return None
    return found if told["of"] == _of(ask, corpus) else None


def _of(ask: Ask, corpus: Corpus) -> dict[str, Any]:
    """Return what a selection follows from, as JSON gives it back."""
    settings = ask.settings
    told = {
        "student": ask.student,
        "teacher": ask.teacher,
        "share": settings.select_share,
        "seed": settings.seed,
        "context": settings.context,
        "files": corpus.files,
    }
    found: dict[str, Any] = json.loads(json.dumps(told, default=str))
    return found
