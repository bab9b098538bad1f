"""The end of a linearization: the converted model with what its stages have changed."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.errors import PlanError
from surgery.linearize.convert import linearize
from surgery.plan import Plan, Step, TensorSpec, check_plan

OPERATION = "linearize stages"


def changed(model: Checkpoint, before: Mapping[str, Any], after: Mapping[str, Any]) -> Plan:
    """Plan a file of the tensors of a model that its stages have changed, byte for byte.

    Args:
        before, after: digests by name, of the model before its stages and of itself.

    Raises:
        PlanError: none was changed.
    """
    names = [name for name in model.tensors if after.get(name) != before.get(name)]
    if not names:
        raise PlanError(model.ref, "came out of its stages as it went in")
    steps = tuple(_copy(model, name) for name in names)
    unread = dict.fromkeys((n for n in model.tensors if n not in names), "as it was")
    plan = Plan(
        operation="linearize changed",
        parameters={},
        sources=(model,),
        steps=steps,
        order=tuple(names),
        config=None,
        dropped=unread,
    )
    return check_plan(plan)


def assembled(
    base: Checkpoint,
    trained: Checkpoint | None = None,
    *,
    asked: Mapping[str, Any],
    told: Mapping[str, Any],
) -> Plan:
    """Plan a linearized model: the conversion, and what was trained in its place.

    Args:
        trained: the file of `changed`.
        asked: what `linearize` is given beside the base.
        told: facts of the stages for the record: settings, curves, the table.

    Raises:
        RecipeError, PlanError, CheckpointError: those of `linearize`, or tensors do not fit.
    """
    plan = linearize(base, **asked)
    new = dict(trained.tensors) if trained is not None else {}
    for name, tensor in new.items():
        spec = plan.outputs.get(name)
        if spec != TensorSpec(tensor.dtype, tensor.shape):
            fact = f"holds {name} of {tensor.dtype} {list(tensor.shape)}, which does not fit"
            raise PlanError(tensor.file, fact, "name the run that made the model")
    finished = replace(
        plan,
        operation=OPERATION,
        parameters={"asked": dict(asked), "told": dict(told)},
        sources=(base,) if trained is None else (base, trained),
        steps=tuple(_steps(plan, trained, new)),
        dropped={
            **plan.dropped,
            **{n: "replaced by what was trained" for n in new if n in base.tensors},
        },
        facts={**plan.facts, **told},
        notes=tuple(note for note in plan.notes if not new or "nothing of it is" not in note),
    )
    return check_plan(finished)


def _steps(plan: Plan, trained: Checkpoint | None, new: Mapping[str, Any]) -> Iterator[Step]:
    for step in plan.steps:
        name = step.outputs[0][0]
        if trained is not None and name in new:
            yield replace(_copy(trained, name), why="trained")
        else:
            yield step


def _copy(model: Checkpoint, name: str) -> Step:
    tensor = model.tensors[name]
    return Step(inputs=(tensor,), outputs=((name, TensorSpec(tensor.dtype, tensor.shape)),))
