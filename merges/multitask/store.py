"""What a store is made of, and what its config and record tell."""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from math import fsum
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.errors import CheckpointError, RecipeError
from surgery.provenance import read_record

Told = Mapping[str, Mapping[str, float]]
FORMAT = 1
KEY = "surgery_store"
SHARED, MASKS = "shared.", "masks."  # what the names of tensors begin with


@dataclass(frozen=True, kw_only=True)
class Store:
    """An opened store.

    Attributes:
        kind: "emr" or "tall".
        tasks: names, in the order of the masks.
        config: of the models, None where they were bare files.
        names: tensors of the models that the store holds shared, each with the base's name of it.
        copied: tensors that are the same in all models, and are no weights.
        rescaler: "elements", "tensors" or "none": what a task's factor is made of.
    """

    checkpoint: Checkpoint
    kind: str
    tasks: tuple[str, ...]
    config: dict[str, Any] | None
    names: Mapping[str, str]
    copied: tuple[str, ...]
    rescaler: str

    def task(self, name: str) -> int:
        """Return the number of a task.

        Raises:
            RecipeError: there is none of that name.
        """
        if name in self.tasks:
            return self.tasks.index(name)
        close = get_close_matches(name, self.tasks, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(self.tasks)}"
        raise RecipeError(self.checkpoint.ref, f"holds no task {name!r}", hint)

    @cached_property
    def told(self) -> Told:
        """Per shared tensor the figures that its step told.

        Raises:
            CheckpointError: the record is missing or does not tell them.
        """
        record = read_record(self.checkpoint)
        told = record.get("told") if record else None
        if not isinstance(told, dict) or not {SHARED + n for n in self.names} <= set(told):
            fact = "has no record of the sums that its rescalers are made of"
            raise CheckpointError(self.checkpoint.root, fact, "restore surgery.json")
        return told

    @cached_property
    def is_planned(self) -> bool:
        """Whether this stands for a store that is not made yet."""
        record = read_record(self.checkpoint)
        return record is not None and "told" not in record


def figure_names(tasks: int) -> tuple[str, ...]:
    """Name the figures that are told of each tensor, for programs only."""
    each = [f"_{what} {n}" for n in range(tasks) for what in ("own", "kept", "bits")]
    return ("_base", *each)


def factors(store: Store) -> list[float]:
    """Return per task what its masked vector is multiplied by.

    The paper divides the sum of the task vector's magnitudes by that of the masked shared one,
    over all elements; the authors' code adds up the means of tensors instead.
    """
    tensors = store.checkpoint.tensors
    sizes = {SHARED + name: tensors[SHARED + name].numel for name in store.names}
    return factors_of(store.told, sizes, len(store.tasks), store.rescaler)


def factors_of(told: Told, sizes: Mapping[str, int], tasks: int, rescaler: str) -> list[float]:
    """Return the factors from the figures of tensors and their numbers of elements."""
    if rescaler == "none":
        return [1.0] * tasks
    found = []
    for task in range(tasks):
        own, kept = (
            fsum(
                told[name][f"_{what} {task}"] / (max(size, 1) if rescaler == "tensors" else 1)
                for name, size in sizes.items()
            )
            for what in ("own", "kept")
        )
        found.append(own / kept if kept else 1.0)
    return found


def read_store(checkpoint: Checkpoint) -> Store:
    """Return what a checkpoint holds as a store.

    Raises:
        CheckpointError: it is none, or of a later format.
    """
    told = checkpoint.config or {}
    if told.get(KEY) != FORMAT:
        fact = "is no store of task masks"
        if KEY in told:
            fact = f"is a store of format {told[KEY]!r}, this version reads {FORMAT}"
        raise CheckpointError(checkpoint.ref, fact, "make one with `surgery emr build`")
    names: Any = told.get("tensors")
    tasks, copied = _words(told.get("tasks")), _words(told.get("copied"))
    sound = isinstance(names, dict) and _words(list(names.values())) is not None
    if tasks is None or copied is None or not sound or told.get("kind") not in ("emr", "tall"):
        raise CheckpointError(checkpoint.ref, "has a broken config", "make the store again")
    wanted = [*(mark + name for name in names for mark in (SHARED, MASKS)), *copied]
    missing = next((name for name in wanted if name not in checkpoint.tensors), None)
    if missing is not None:
        raise CheckpointError(checkpoint.ref, f"lacks the tensor {missing!r}", "copy it again")
    return Store(
        checkpoint=checkpoint,
        kind=told["kind"],
        tasks=tasks,
        config=told.get("model"),
        names=names,
        copied=copied,
        rescaler=str(told.get("rescaler")),
    )


def _words(value: object) -> tuple[str, ...] | None:
    sound = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return tuple(value) if isinstance(value, list) and sound else None
