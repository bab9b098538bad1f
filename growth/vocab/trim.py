"""Fewer tokens: those that a text uses, and what they need."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from growth.vocab.closure import base_tokens, check_trimmable, needed
from growth.vocab.newrows import NewRows
from growth.vocab.rebuild import (
    named_ids,
    refuse_bare,
    refuse_unnamed,
    vocabulary_plan,
    without,
)
from growth.vocab.renumber import (
    MAP,
    OBSOLETE,
    SETTINGS,
    named_tokens,
    processor_tokens,
    renumbered,
    settings_files,
)
from surgery.checkpoint import Checkpoint
from surgery.checkpoint.jsonfile import read_json_object
from surgery.describe import ranges
from surgery.errors import RecipeError
from surgery.plan import Plan
from surgery.vocabulary.donor import new_configs
from surgery.vocabulary.read import Vocabulary, compact, read_vocabulary


def trim(base: Checkpoint, *, ids: str, facts: Mapping[str, Any] | None = None) -> Plan:
    """Keep the tokens of those ids and what they need; the others' rows go.

    Kept tokens keep their order and get new ids without gaps. Kept as well: bytes or letters,
    the unknown token, what BPE joins kept tokens from, and whatever configs, roles and the
    post-processor name. Rows that no token stands for go.

    Args:
        ids: old ids as ranges, such as `0-255,300`.
        facts: for the record.

    Raises:
        RecipeError: an id has no token, or every token would be kept.
        PlanError: the tokenizer could not do without a token.
    """
    refuse_bare(base, "trimmed")
    vocabulary = trimmable(base)
    old = {number: token for token, number in vocabulary.ids.items() if number < vocabulary.rows}
    asked = _parse(ids)
    unknown = next((number for number in asked if number not in old), None)
    if unknown is not None:
        raise RecipeError("vocab trim", f"no token has the id {unknown}", "see tokenizer.json")
    fixed = base_tokens(vocabulary) | _named(base, vocabulary, old)
    kept = needed(vocabulary, {old[number] for number in asked} | fixed)
    numbers = [number for number in sorted(old) if old[number] in kept]
    if len(numbers) == vocabulary.rows:
        raise RecipeError("vocab trim", "every token is needed, so nothing would go")
    new = {old[number]: place for place, number in enumerate(numbers)}
    return _plan(base, vocabulary, np.array(numbers, np.int64), new, ids=ids, facts=facts or {})


def trimmable(base: Checkpoint) -> Vocabulary:
    """Return the vocabulary of a model that can be trimmed.

    Raises:
        CheckpointError: there is none that can be read.
        PlanError: it cannot be trimmed.
        RecipeError: it has no tokenizer.json.
    """
    vocabulary = read_vocabulary(base)
    if vocabulary.document is None:
        fact = f"has a {vocabulary.kind} tokenizer without a tokenizer.json"
        remedy = "load it with transformers and save it once, which writes one"
        raise RecipeError(vocabulary.ref, fact, remedy)
    check_trimmable(vocabulary)
    refuse_unnamed(base, vocabulary)
    return vocabulary


def _plan(
    base: Checkpoint,
    vocabulary: Vocabulary,
    numbers: Any,  # noqa: ANN401 - an array
    new: Mapping[str, int],
    *,
    ids: str,
    facts: Mapping[str, Any],
) -> Plan:
    place = {int(number): at for at, number in enumerate(numbers)}
    config, configs, lost = new_configs(base, None, size=len(numbers), move=place.get)
    here = {path.name: path for path in base.carried}
    told = {name: read_json_object(here[name]) for name in (SETTINGS, MAP) if name in here}
    files = {"tokenizer.json": compact(renumbered(vocabulary, new))}
    rows = NewRows(copy=numbers, pieces={}, known=vocabulary.rows)
    return vocabulary_plan(
        base,
        rows,
        operation="vocab trim",
        parameters={"ids": ids},
        config=config,
        carried=without(base.carried, OBSOLETE),
        written=files | settings_files(told, new) | configs,
        facts={"tokens_before": len(vocabulary.ids), "tokens": len(new), **facts},
        notes=(f"{len(new)} of {len(vocabulary.ids)} tokens stay", *lost),
    )


def _named(base: Checkpoint, vocabulary: Vocabulary, old: Mapping[int, str]) -> set[str]:
    """Return the tokens that configs, roles, settings and the post-processor name."""
    found = {old[number] for number in named_ids(base) if number in old}
    document = vocabulary.document or {}
    found |= set(vocabulary.roles.values()) | named_tokens(vocabulary.settings)
    found |= processor_tokens(document.get("post_processor"))
    padding = document.get("padding")
    found |= {str(padding.get("pad_token"))} if isinstance(padding, dict) else set()
    return {token for token in found if token in vocabulary.ids}


def _parse(text: str) -> Sequence[int]:
    found: list[int] = []
    for part in text.split(",") if text else ():
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise RecipeError(f"ids {text[:40]}", f"{part[:40]!r} is no id or range of ids")
        found += range(int(first), int(last or first) + 1)
    return found


def as_ranges(ids: Iterable[int]) -> str:
    """Write ids as `trim` takes them."""
    return ranges(sorted(set(ids)))


def read_kept(path: Path, vocabulary: Vocabulary) -> list[int]:
    """Return the ids of the tokens that a file names, one a line, as the tokenizer spells them.

    Raises:
        RecipeError: one is no token.
    """
    from growth.vocab.extend import read_tokens

    tokens = read_tokens(path)
    wrong = next((token for token in tokens if token not in vocabulary.ids), None)
    if wrong is not None:
        raise RecipeError(path, f"{wrong[:40]!r} is no token", "write them as tokenizer.json does")
    return [vocabulary.ids[token] for token in tokens]
