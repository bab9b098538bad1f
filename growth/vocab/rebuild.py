"""A plan that changes the tables of tokens and copies everything else."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from growth.vocab.newrows import NewRows, resized_table
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.checkpoint.jsonfile import read_json_object
from surgery.errors import CheckpointError, PlanError
from surgery.plan import Plan, Step, TensorSpec, check_plan
from surgery.vocabulary.config import moved
from surgery.vocabulary.donor import GENERATION
from surgery.vocabulary.read import Vocabulary
from surgery.vocabulary.tables import (
    Table,
    embedding,
    find_tables,
    refuse_tables_per_layer,
    unknown_tables,
)

Make = Callable[[Table], Step | None]  # a step that makes a table, None where rows are copied


def is_tied(base: Checkpoint) -> bool:
    """Whether the config ties the head to the embedding."""
    config = base.config or {}
    return bool(config.get("tie_word_embeddings"))


def vocabulary_plan(
    base: Checkpoint,
    rows: NewRows,
    *,
    operation: str,
    parameters: Mapping[str, Any],
    config: dict[str, Any] | None,
    carried: tuple[Path, ...],
    written: Mapping[str, bytes] | None = None,
    facts: Mapping[str, Any] | None = None,
    notes: tuple[str, ...] = (),
    others: tuple[Checkpoint, ...] = (),
    make: Make = lambda _: None,
) -> Plan:
    """Plan a model whose tables have new rows.

    Args:
        others: further inputs, of which steps of `make` read what they need.
        make: gives the step of a table that is not made by `rows` alone.

    Raises:
        CheckpointError: a table is quantised, or the model has further ones inside its layers.
    """
    refuse_tables_per_layer(base)
    tables = find_tables(base)
    steps = tuple(
        (make(tables[name]) if name in tables else None)
        or _step(_resized(base, tables[name], rows) if name in tables else tensor)
        for name, tensor in base.tensors.items()
    )
    read = {(t.file, t.name) for step in steps for t in step.stored}
    dropped = {
        name: "only its vocabulary is taken"
        for other in others
        for name, tensor in other.tensors.items()
        if (tensor.file, tensor.name) not in read
    }
    return check_plan(
        Plan(
            operation=operation,
            parameters=parameters,
            sources=(base, *others),
            steps=steps,
            order=tuple(base.tensors),
            config=config,
            carried=carried,
            written=written or {},
            dropped=dropped,
            facts={"rows": len(rows.copy), "made_of": _counted(rows), **(facts or {})},
            notes=(*base.notes, *notes, *_left(base, rows)),
        )
    )


def _counted(rows: NewRows) -> dict[str, int]:
    return {name: count for name, count in rows.counts().items() if count}


def _resized(base: Checkpoint, table: Table, rows: NewRows) -> TensorInfo:
    label = embedding(base).name if is_tied(base) else table.tensor.name
    return resized_table(table.tensor, rows, axis=table.axis, label=label)


def _step(tensor: TensorInfo) -> Step:
    spec = TensorSpec(tensor.dtype, tensor.shape)
    why = "vocabulary" if getattr(tensor, "why", "") else "copy"
    return Step(inputs=(tensor,), outputs=((tensor.name, spec),), why=why)


def _left(base: Checkpoint, rows: NewRows) -> tuple[str, ...]:
    left = [] if rows.is_identity(embedding(base).shape[0]) else unknown_tables(base)
    told = f"{', '.join(left[:3])} may depend on token ids and is kept as it is"
    return (told,) if left else ()


def refuse_bare(base: Checkpoint, what: str) -> None:
    """Refuse a single file, which has no tokenizer.

    Raises:
        CheckpointError: it is one.
    """
    if base.bare or base.config is None:
        fact = f"is a file without tokenizer and config, so its vocabulary cannot be {what}"
        raise CheckpointError(base.ref, fact, "name the model's directory")


def named_ids(base: Checkpoint) -> set[int]:
    """Return the ids that config and generation config name."""
    found: set[int] = set()

    def note(number: int) -> int:
        found.add(number)
        return number

    moved(base.config or {}, note, [])
    path = next((path for path in base.carried if path.name == GENERATION), None)
    moved(read_json_object(path) if path else {}, note, [])
    return found


def refuse_unnamed(base: Checkpoint, vocabulary: Vocabulary) -> None:
    """Refuse a model whose config names a row that no token stands for.

    Raises:
        PlanError: it does; the row would get another meaning, or go.
    """
    named = named_ids(base) - set(vocabulary.ids.values())
    number = min((n for n in named if n < vocabulary.rows), default=None)
    if number is not None:
        fact = f"names the id {number}, which is no token of the tokenizer"
        raise PlanError(base.root / "config.json", fact, "add the token to the tokenizer first")


def without(files: tuple[Path, ...], names: tuple[str, ...]) -> tuple[Path, ...]:
    """Return the files that are not called so."""
    return tuple(path for path in files if path.name not in names)
