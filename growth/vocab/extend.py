"""New tokens behind the old ones, with rows of their own."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from growth.vocab.choices import How, Init
from growth.vocab.newrows import NewRows
from growth.vocab.pieces import Cutter
from growth.vocab.rebuild import refuse_bare, refuse_unnamed, vocabulary_plan, without
from surgery.checkpoint import Checkpoint
from surgery.checkpoint.jsonfile import read_json_object, read_small_file
from surgery.errors import RecipeError
from surgery.plan import Plan
from surgery.vocabulary.config import resized
from surgery.vocabulary.read import FLAGS, Vocabulary, compact, read_vocabulary
from surgery.vocabulary.tables import section
from surgery.vocabulary.union import Union, unite

MOST = 1 << 20  # tokens at once
LONGEST = 1 << 10  # letters of a token
SPECIAL_LISTS = ("extra_special_tokens", "additional_special_tokens")
SETTINGS, MAP = "tokenizer_config.json", "special_tokens_map.json"


def extend(
    base: Checkpoint,
    *,
    tokens: Sequence[str],
    init: How = "mean",
    special: bool = False,
    seed: int = 0,
) -> Plan:
    """Append tokens to the tokenizer, and rows for them to embedding and head.

    Old rows stay bit for bit. Rows that pad the table get the first new tokens.

    Args:
        tokens: none of them a token already.
        init: `mean` of all old rows, `subword` the mean of the pieces that the old tokenizer cuts
            a token into, `zero`, or `random` with each column's mean and deviation.
        special: they are control tokens, which decoding may leave out.

    Raises:
        RecipeError: a token is there already, empty or named twice.
        CheckpointError: the tokenizer cannot be added to.
        PlanError: the config names an id that is no token.
    """
    if init not in get_args(How):
        raise RecipeError(f"--init {init}", f"is none of {', '.join(get_args(How))}")
    refuse_bare(base, "extended")
    vocabulary = read_vocabulary(base)
    _check(tokens, vocabulary)
    refuse_unnamed(base, vocabulary)
    flags = {**dict.fromkeys(FLAGS, False), "normalized": not special, "special": special}
    union = unite(vocabulary, [], dict.fromkeys(tokens, flags))
    size = max(vocabulary.rows, max(union.ids.values()) + 1)
    new = _rows(
        vocabulary, [union.ids[token] for token in tokens], tokens, size=size, init=init, seed=seed
    )
    return vocabulary_plan(
        base,
        new,
        operation="vocab extend",
        parameters={"tokens": list(tokens), "init": init, "special": special, "seed": seed},
        config=resized(base.config or {}, section(base.config or {}), size),
        carried=without(base.carried, union.obsolete),
        written=dict(union.files) | (_listed(base, union, tokens) if special else {}),
        facts={"ids": {token: union.ids[token] for token in tokens}},
        notes=union.notes,
    )


def read_tokens(path: Path) -> list[str]:
    """Return the tokens of a file, one a line, spaces included; empty lines say nothing.

    Raises:
        RecipeError: it cannot be read as text.
    """
    try:
        text = read_small_file(path).decode()
    except UnicodeDecodeError as error:
        raise RecipeError(path, "is no UTF-8 text", "write one token a line") from error
    return [line for line in text.replace("\r\n", "\n").split("\n") if line]


def _check(tokens: Sequence[str], vocabulary: Vocabulary) -> None:
    remedy = "name tokens that the tokenizer does not have"
    if not tokens:
        raise RecipeError("vocab extend", "is given no token", "name them: --token or --tokens")
    if len(tokens) > MOST:
        raise RecipeError("vocab extend", f"is given {len(tokens)} tokens", f"{MOST} at most")
    wrong = next((t for t in tokens if not t.strip() or len(t) > LONGEST), None)
    if wrong is not None:
        fact = f"{wrong[:40]!r} is empty, only space, or longer than {LONGEST} letters"
        raise RecipeError("vocab extend", fact)
    known = next((token for token in tokens if token in vocabulary.ids), None)
    if known is not None:
        number = vocabulary.ids[known]
        raise RecipeError("vocab extend", f"{known!r} is a token already, id {number}", remedy)
    if len(set(tokens)) < len(tokens):
        twice = next(token for n, token in enumerate(tokens) if token in tokens[:n])
        raise RecipeError("vocab extend", f"{twice!r} is named twice", "name it once")


def _rows(
    vocabulary: Vocabulary,
    ids: Sequence[int],
    tokens: Iterable[str],
    *,
    size: int,
    init: How,
    seed: int,
) -> NewRows:
    copy = np.full(size, -1, np.int64)
    copy[: vocabulary.rows] = np.arange(vocabulary.rows)
    copy[list(ids)] = -1
    pieces: dict[int, Sequence[int]] = {}
    if init == "subword":
        cutter = Cutter(vocabulary)
        cut = zip(ids, (cutter.rows(token.encode()) for token in tokens), strict=True)
        pieces = {number: rows for number, rows in cut if rows}
    rest: Init = "mean" if init == "subword" else init
    known = min(vocabulary.end, vocabulary.rows)
    return NewRows(copy=copy, pieces=pieces, rest=rest, known=known, seed=seed)


def _listed(base: Checkpoint, union: Union, tokens: Sequence[str]) -> dict[str, bytes]:
    """Name new special tokens in the files that list special tokens."""
    here = {path.name: path for path in base.carried}
    found: dict[str, bytes] = {}
    for name in (SETTINGS, MAP):
        told: dict[str, Any] = {}
        if name in union.files:
            told = json.loads(union.files[name])
        elif name in here:
            told = read_json_object(here[name])
        elif name == MAP:
            continue
        found[name] = compact(_with_special(told, tokens))
    return found


def _with_special(told: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    key = next((key for key in SPECIAL_LISTS if told.get(key)), SPECIAL_LISTS[0])
    old = told.get(key) or []
    if isinstance(old, dict):  # by names that code asks for; tokenizer.json says it is special
        return dict(told)
    return {**told, key: [*old, *tokens]}
