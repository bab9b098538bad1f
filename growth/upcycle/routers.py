"""Measured rows of routers: a small checkpoint between the measurement and the plan."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.errors import CheckpointError, PlanError

KEY = "surgery_gates"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToldGate:
    """What a file of rows says of itself.

    Attributes:
        question: the gate, its prompts and models; two files with one question hold the same.
        closest: per layer the largest cosine between two experts' rows.
    """

    question: Mapping[str, Any]
    closest: Mapping[int, float]


def rows_name(layer: int) -> str:
    """Return the name of a layer's rows, [experts, hidden], in their file."""
    return f"layers.{layer}.router"


def told_gate(rows: Checkpoint) -> ToldGate:
    """Read what a file of rows says of itself.

    Raises:
        CheckpointError: it says nothing, so it is another file.
    """
    try:
        told = json.loads(rows.metadata[KEY])
        closest = {int(layer): float(c) for layer, c in told["closest"].items()}
        return ToldGate(question=dict(told["question"]), closest=closest)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        fact = "does not hold measured rows of routers"
        raise CheckpointError(rows.ref, fact, "name a file that surgery moe wrote") from error


def check_rows(
    rows: Checkpoint, layers: Collection[int], *, shape: tuple[int, int], gate: str
) -> None:
    """Refuse rows that are of another gate, model or number of experts.

    Raises:
        CheckpointError: it is another kind of file.
        PlanError: with what does not fit.
    """
    told = told_gate(rows).question.get("gate")
    if told != gate:
        fact = f"holds rows of the gate {told}, not {gate}"
        raise PlanError(rows.ref, fact, "remove it, or name another file")
    wanted = {rows_name(layer) for layer in layers}
    for layer in sorted(layers):
        found = rows.tensors.get(rows_name(layer))
        if found is None or found.shape != shape:
            has = "nothing" if found is None else str(list(found.shape))
            fact = f"holds {has} for layer {layer}, where the mixture has {list(shape)}"
            raise PlanError(rows.ref, fact, "remove it, or name another file")
    more = next((name for name in rows.tensors if name not in wanted), None)
    if more is not None:
        fact = f"holds {more}, a layer that has no router in this mixture"
        raise PlanError(rows.ref, fact, "remove it, or name another file")
