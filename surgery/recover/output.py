"""A healed model: the student with what was trained in its place, everything else as it was."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.checkpoint import Checkpoint, TensorInfo, View, make_view, open_checkpoint, read_rows
from surgery.checkpoint.adapters import CONFIG
from surgery.errors import PlanError
from surgery.plan import Plan, Step, TensorSpec, check_plan

TRAINED = "trained.safetensors"
Read = Any


def open_trained(student: Checkpoint, folder: Path) -> tuple[Checkpoint, ...]:
    """Open what a training run exported: the student, its adapter added, and replaced tensors.

    Raises:
        CheckpointError: something is missing or does not fit the student.
    """
    first = student
    if (folder / CONFIG).exists():
        first = open_checkpoint(f"{student.ref}+{folder}")
    file = folder / TRAINED
    return (first, open_checkpoint(file)) if file.exists() else (first,)


def healed(
    student: Checkpoint,
    trained: Checkpoint | None = None,
    *,
    mode: str,
    handed_on: Mapping[str, Any] | None = None,
    told: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan the student with what was trained in its place.

    Adapters are added as `lora fuse` adds them; where the student is sparse, zeros stay zero, as
    they did in training. Replaced tensors are rounded once to the student's dtype.

    Args:
        student: with the adapter added, if one was trained.
        trained: tensors by the student's names.
        mode: what was trained.
        handed_on: facts of the student that hold for the result: `masked`, `trainable_layers`.
        told: figures of the run for the record: parameters trained, digests of data, curve.

    Raises:
        PlanError: a tensor that the student does not have, or nothing was trained.
    """
    changed = dict(trained.tensors) if trained is not None else {}
    _check(student, changed)
    facts = dict(handed_on or {})
    masked = {f"{module}.weight" for module in facts.get("masked") or ()}
    steps = tuple(
        _step(tensor, changed.get(name), keeps_zeros=name in masked)
        for name, tensor in student.tensors.items()
    )
    plan = Plan(
        operation="recover",
        parameters={"mode": mode, "handed_on": facts, "told": dict(told or {})},
        sources=(student,) if trained is None else (student, trained),
        steps=steps,
        order=tuple(student.tensors),
        config=student.config,
        carried=student.carried,
        dropped=dict.fromkeys(changed, "replaced by what was trained"),
        facts={"trained": mode, **facts, **dict(told or {})},
        notes=student.notes,
    )
    return check_plan(plan)


def keep_adapter(folder: Path, out: Path) -> Path | None:
    """Copy the adapter of a run to a directory beside the output; None where there is none.

    Raises:
        PlanError: something else lies there.
    """
    if not (folder / CONFIG).exists():
        return None
    place = out.with_name(f"{out.name}-adapter")
    if place.exists() and not (place / CONFIG).exists():
        raise PlanError(place, "is there, and is no adapter", "move it away")
    shutil.copytree(folder, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns(TRAINED))
    return place


def _check(student: Checkpoint, changed: Mapping[str, TensorInfo]) -> None:
    if not changed and not student.adapters:
        raise PlanError(student.ref, "comes with nothing that was trained")
    for name, tensor in changed.items():
        own = student.tensors.get(name)
        if own is None or own.shape != tensor.shape:
            has = f"has it of shape {list(own.shape)}" if own is not None else "does not have it"
            fact = f"holds {name} of shape {list(tensor.shape)}, the student {has}"
            raise PlanError(tensor.file, fact, "name the student that was trained")


def _step(tensor: TensorInfo, trained: TensorInfo | None, *, keeps_zeros: bool) -> Step:
    outputs = ((tensor.name, TensorSpec(tensor.dtype, tensor.shape)),)
    if trained is None:
        sparse = keeps_zeros and isinstance(tensor, View)
        source = _with_zeros(tensor) if sparse and isinstance(tensor, View) else tensor
        return Step(inputs=(source,), outputs=outputs, why=getattr(source, "why", "copy"))
    if trained.dtype == tensor.dtype:
        return Step(inputs=(trained,), outputs=outputs, why="trained")
    return Step(inputs=(trained,), outputs=outputs, fn=_same, elementwise=True, why="trained")


def _same(tensor: Any) -> Any:  # noqa: ANN401
    return tensor


def _with_zeros(view: View) -> View:
    """Return a weight with an adapter added where the stored weight is not zero."""
    base = view.stored[0]

    def make(read: Read, start: int, count: int) -> Any:  # noqa: ANN401
        zero = read(base, start, count) == 0
        return read_rows(read, view, start, count).masked_fill(zero, 0.0)

    return make_view(
        view.name,
        dtype=view.dtype,
        shape=view.shape,
        stored=(view,),
        make=make,
        why="adapt, zeros kept",
        key=f"zeros {view.key}",
        held=view.held,
    )
