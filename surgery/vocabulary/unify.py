"""Bring models to one vocabulary: tables permuted, tokenizer and configs made anew."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.errors import RecipeError
from surgery.vocabulary.config import Move
from surgery.vocabulary.donor import Files, choose_files, new_configs
from surgery.vocabulary.explain import explain_difference
from surgery.vocabulary.instructions import (
    Instruction,
    counted,
    find_model,
    follow,
    foreign,
    read_instructions,
)
from surgery.vocabulary.permute import permuted
from surgery.vocabulary.read import Vocabulary, read_vocabulary
from surgery.vocabulary.rows import RowMap, own_rows, row_maps
from surgery.vocabulary.tables import (
    MATRIX,
    Table,
    embedding,
    find_tables,
    refuse_tables_per_layer,
    unknown_tables,
)
from surgery.vocabulary.template import Template, choose_template
from surgery.vocabulary.union import Union, unite

PLACE = "tokenizer.source"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unified:
    """Models of one vocabulary, and what goes beside the output's weights.

    Attributes:
        checkpoints: the models, their tables views of the new order where that differs.
        ids: token to new id; empty where the tokenizers were not read.
        size: rows of every table; 0 where nothing was changed.
        maps: per model where its rows come from; empty where nothing was changed.
        config: the donor's config, with the new size and ids.
        carried: the donor's files to carry along.
        written: name to bytes of files made anew, for `Plan.written`.
        facts: choice, sizes and counts, for the record.
        notes: what the user should know.
    """

    checkpoints: tuple[Checkpoint, ...]
    config: dict[str, Any] | None
    carried: tuple[Path, ...]
    ids: Mapping[str, int] = field(default_factory=dict)
    size: int = 0
    maps: tuple[RowMap, ...] = ()
    written: Mapping[str, bytes] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def unify(
    checkpoints: Sequence[Checkpoint],
    *,
    choice: str | None = None,
    base: int | None = None,
    donor: int | None = None,
    names: Sequence[str] | None = None,
    tokens: Mapping[str, object] | None = None,
    pad_to_multiple_of: int | None = None,
    chat_template: str | None = None,
) -> Unified:
    """Bring models to one vocabulary. Only headers and tokenizer files are read.

    A model's row of a token that it lacks is the base's, else the average of those that have it.

    Args:
        checkpoints: every model once.
        choice: `union`, `base` or the name of a model, whose tokenizer the output gets; None
            asks that the vocabularies are the same.
        base: the place of the base model.
        donor: the place of the model that gives config and other files; the base, else the first.
        names: how a recipe calls each model; their refs by default.
        tokens: where single tokens' rows come from, as the recipe has it.
        pad_to_multiple_of: what the number of rows must be a multiple of.
        chat_template: see `choose_template`; the tokenizer's own by default.

    Raises:
        RecipeError: what was asked for makes no sense, or the vocabularies differ unasked.
        CheckpointError: a tokenizer is missing, broken or of a kind that is not read.
    """
    names = names or [checkpoint.ref for checkpoint in checkpoints]
    donor = donor if donor is not None else base or 0
    source = _source(choice, base, names, donor)
    _check_multiple(pad_to_multiple_of)
    template = choose_template(chat_template, checkpoints, names) if chat_template else None
    difference = explain_difference(checkpoints)
    if choice is None and difference is not None:
        remedy = "say which to take: tokenizer: {source: union}, base, or a model's name"
        raise RecipeError("tokenizer", f"the vocabularies differ: {difference}", remedy)
    if difference is None and not tokens and not pad_to_multiple_of:
        files = choose_files(checkpoints, donor=donor, source=source, template=template)
        return _unchanged(checkpoints, donor, files, template)
    ask = _Ask(source, base, donor, choice == "union", tokens or {}, pad_to_multiple_of)
    return _changed(checkpoints, names, ask, template)


@dataclass(frozen=True, slots=True)
class _Ask:
    source: int
    base: int | None
    donor: int
    union: bool
    tokens: Mapping[str, object]
    multiple: int | None


def _source(choice: str | None, base: int | None, names: Sequence[str], donor: int) -> int:
    """Return the place of the model whose tokenizer the output's begins with."""
    if choice in (None, "union", "base"):
        return donor if base is None else base
    return find_model(PLACE, choice, names)


def _check_multiple(told: object) -> None:
    if told is not None and (type(told) is not int or told < 1):
        raise RecipeError("tokenizer.pad_to_multiple_of", f"is {told!r}", "write a number above 0")


def _unchanged(
    checkpoints: Sequence[Checkpoint], donor: int, files: Files, template: Template | None
) -> Unified:
    return Unified(
        checkpoints=tuple(checkpoints),
        config=checkpoints[donor].config,
        carried=files.carried,
        written=files.written,
        facts=_rule(template),
        notes=files.notes,
    )


def _changed(
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    ask: _Ask,
    template: Template | None,
) -> Unified:
    models = [read_vocabulary(checkpoint) for checkpoint in checkpoints]
    instructions = read_instructions(ask.tokens, models, names)
    union = _union(models, ask, instructions)
    ids = union.ids if union else models[ask.source].ids
    size = _size(models[ask.source], ids, ask.multiple)
    maps = row_maps(own_rows(models, models[ask.source], ids, size), ask.base)
    follow(instructions, maps, ids)
    whole = None if ask.union or ask.source == ask.donor else checkpoints[ask.source]
    move = _mover(models[ask.donor], ids, size)
    config, configs, lost = new_configs(checkpoints[ask.donor], whole, size=size, move=move)
    files = choose_files(
        checkpoints, donor=ask.donor, source=ask.source, template=template, union=union
    )
    return Unified(
        checkpoints=tuple(_moved(checkpoints, maps)),
        config=config,
        carried=files.carried,
        written={**files.written, **configs},
        ids=ids,
        size=size,
        maps=tuple(maps),
        facts={**_facts(names, models, ask, maps), **_rule(template)},
        notes=(*files.notes, *lost, *(union.notes if union else ()), *_left(checkpoints, maps)),
    )


def _union(
    models: Sequence[Vocabulary], ask: _Ask, instructions: Sequence[Instruction]
) -> Union | None:
    """Return the new tokenizer, or None where the source's stays as it is."""
    source = models[ask.source]
    others = [m for n, m in enumerate(models) if n != ask.source] if ask.union else []
    known = source.ids.keys() | {token for model in others for token in model.ids}
    more = {token: _flags(token, models) for token in foreign(instructions, known)}
    grown = more or any(not model.ids.keys() <= source.ids.keys() for model in others)
    return unite(source, others, more) if grown else None


def _flags(token: str, models: Sequence[Vocabulary]) -> Mapping[str, Any]:
    """Return the flags of a token that a recipe adds: the first model's that has it added."""
    return next((m.added[token] for m in models if token in m.added), {"normalized": True})


def _size(source: Vocabulary, ids: Mapping[str, int], multiple: int | None) -> int:
    """Return the rows of the new tables: never fewer than the source's, which may be padded."""
    rows = max(source.rows, max(ids.values(), default=-1) + 1)
    return -(-rows // (multiple or 1)) * (multiple or 1)


def _mover(donor: Vocabulary, ids: Mapping[str, int], size: int) -> Move:
    old = {number: token for token, number in donor.ids.items()}
    new = set(ids.values())

    def move(number: int) -> int | None:
        if number in old:
            return ids.get(old[number])
        return number if number < size and number not in new else None

    return move


def _moved(checkpoints: Sequence[Checkpoint], maps: Sequence[RowMap]) -> Iterator[Checkpoint]:
    """Yield the checkpoints with their tables in the new order."""
    found = [find_tables(checkpoint) for checkpoint in checkpoints]
    for checkpoint, tables, row_map in zip(checkpoints, found, maps, strict=True):
        if not row_map.is_identity(embedding(checkpoint).shape[0]):
            refuse_tables_per_layer(checkpoint)
        tensors = dict(checkpoint.tensors)
        for name, table in tables.items():
            every = _same_table(name, table, found)
            tensors[name] = permuted(table.tensor, row_map, every, axis=table.axis)
        yield replace(checkpoint, tensors=tensors)


def _same_table(
    name: str, table: Table, found: Sequence[Mapping[str, Table]]
) -> dict[int, TensorInfo]:
    """Return a table of every model by its place; where a head is tied, it is the embedding."""
    tables: dict[int, TensorInfo] = {}
    for number, every in enumerate(found):
        if name in every:
            tables[number] = every[name].tensor
        elif len(table.tensor.shape) == MATRIX and table.axis == 0:
            tables[number] = next(iter(every.values())).tensor
    return tables


def _rule(template: Template | None) -> dict[str, str]:
    return {"chat_template": template.rule} if template else {}


def _facts(
    names: Sequence[str], models: Sequence[Vocabulary], ask: _Ask, maps: Sequence[RowMap]
) -> dict[str, Any]:
    return {
        "source": "union" if ask.union else names[ask.source],
        "tokens": [len(model.ids) for model in models],
        "rows": [model.rows for model in models],
        "new_rows": maps[0].size,
        "taken_from": counted(maps),
    }


def _left(checkpoints: Sequence[Checkpoint], maps: Sequence[RowMap]) -> Iterator[str]:
    """Yield what has the size of a vocabulary and is not treated as one."""
    for checkpoint, row_map in zip(checkpoints, maps, strict=True):
        rows = embedding(checkpoint).shape[0]
        left = [] if row_map.is_identity(rows) else unknown_tables(checkpoint)
        if left:
            yield f"{checkpoint.ref}: {', '.join(left[:3])} may depend on token ids and is kept"
