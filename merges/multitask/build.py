"""Write a store: one task vector for all models, and a mask of bits for each."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from merges.multitask.bits import Packer, block_size, blocks, packed_shape
from merges.multitask.identity import Checksum
from merges.multitask.rules import Rule, rule_of, sums
from merges.multitask.store import FORMAT, KEY, MASKS, SHARED, figure_names
from surgery.checkpoint import Checkpoint
from surgery.errors import RecipeError
from surgery.plan import Plan, Step, Tell, TensorSpec, check_plan
from surgery.recipe import compile, merge_models

METHOD = "consensus"  # any task-vector method: it says how the models' tensors belong together
VECTORS = 12  # float64 vectors of a block that a step holds, beside four for each model


def build_store(
    base: Checkpoint,
    *models: Checkpoint,
    kind: str,
    tasks: Sequence[str] | None = None,
    bounds: Sequence[float] = (),
    rescaler: str = "elements",
) -> Plan:
    """Return the plan of a store for models that were tuned from one base.

    The store holds what is shared and the masks; the base itself it does not hold. EMR shares a
    model, as its weights are all some model's own, and so exact; TALL shares a vector.

    Args:
        kind: "emr" or "tall".
        tasks: a name per model; by default those of the models.
        bounds: lambda of each TALL mask.
        rescaler: of EMR, "elements" as in the paper or "tensors" as in the authors' code.

    Raises:
        RecipeError: fewer than two models, or names that do not tell them apart.
        PlanError: the models do not fit together.
    """
    names = list(tasks) if tasks else _named(models)
    _check(names, len(models), kind, bounds)
    refs = [f"the model of task {name}" for name in names]
    opened = dict(zip(["base", *refs], (base, *models), strict=True))
    merged = compile(merge_models(METHOD, refs, base="base"), open=lambda ref: opened[ref])
    rule = rule_of(kind, bounds)
    shared = {s.outputs[0][0]: s.inputs[0].name for s in merged.steps if s.why == METHOD}
    steps = tuple(
        _shared_step(step, rule, kind, repr((kind, list(bounds)))) if step.why == METHOD else step
        for step in merged.steps
    )
    return check_plan(
        Plan(
            operation=f"{kind} build",
            parameters={"kind": kind, "tasks": names, "bounds": list(bounds), "rescaler": rescaler},
            sources=merged.sources,
            steps=steps,
            order=tuple(name for step in steps for name, _ in step.outputs),
            config={
                KEY: FORMAT,
                "kind": kind,
                "tasks": names,
                "rescaler": rescaler if kind == "emr" else "none",
                "tensors": shared,
                "copied": [s.outputs[0][0] for s in merged.steps if s.why != METHOD],
                "model": merged.config,
            },
            dropped=merged.dropped,
            notes=(*merged.notes, _sizes(steps, models)),
        )
    )


def _sizes(steps: Sequence[Step], models: Sequence[Checkpoint]) -> str:
    """Tell what a store saves."""
    masks = sum(s.nbytes for step in steps for n, s in step.outputs if n.startswith(MASKS))
    every = sum(step.bytes_out for step in steps)
    own = sum(model.nbytes for model in models)
    return (
        f"{len(models)} models of {own / 1e6:.2f} MB in all are {every / 1e6:.2f} MB, "
        f"{masks / 1e6:.2f} MB of it masks, beside the base"
    )


def _named(models: Sequence[Checkpoint]) -> list[str]:
    names: list[str] = []
    for model in models:
        name, count = model.name, 2
        while name in names:
            name, count = f"{model.name}-{count}", count + 1
        names.append(name)
    return names


def _check(names: Sequence[str], models: int, kind: str, bounds: Sequence[float]) -> None:
    if models < 2:  # noqa: PLR2004 - a store of one is a copy
        raise RecipeError(kind, "needs two or more models", "one model needs no store")
    if len(names) != models or len(set(names)) != models:
        fact = f"has the names {', '.join(names)} for {models} models"
        raise RecipeError("--name", fact, "give each model a name of its own")
    if kind == "tall" and len(bounds) != models:
        raise RecipeError("--lambda", f"has {len(bounds)} values for {models} models")
    wrong = next((b for b in bounds if not 0 <= b < float("inf")), None)
    if wrong is not None:
        raise RecipeError("--lambda", f"{wrong:g} is below 0 or not a number")


def _shared_step(step: Step, rule: Rule, kind: str, key: str) -> Step:
    """Turn the step that merges a tensor into the one that shares it."""
    ((name, spec),) = step.outputs
    tasks = len(step.inputs) - 1
    masks = TensorSpec("U8", packed_shape(spec.shape, tasks))
    return Step(
        outputs=((SHARED + name, spec), (MASKS + name, masks)),
        inputs=step.inputs,
        fn=partial(_share, rule=rule, is_model=kind == "emr"),
        streamed=True,
        scratch=8 * block_size(spec.shape) * (4 * tasks + VECTORS),
        why=kind,
        key=key,
        tells=figure_names(tasks),
    )


def _share(base: Any, *models: Any, rule: Rule, is_model: bool) -> Iterator[Any]:  # noqa: ANN401
    """Yield the shared tensor, then the masks, then the figures; Stored in, tensors out."""
    checksum = Checksum()
    found = [[0.0, 0.0, 0.0] for _ in models]
    for start, *others in blocks([base, *models]):
        checksum.feed(start)
        deltas = [other - start for other in others]
        shared = rule(deltas)
        for totals, new in zip(found, sums(deltas, shared), strict=True):
            totals[:] = [total + more for total, more in zip(totals, new, strict=True)]
        # Minus plus zero leaves a weight of -0.0 as it is; plus zero would not.
        yield start - shared.vector.neg_().add_(0.0) if is_model else shared.vector
    packer = Packer(len(models))
    for start, *others in blocks([base, *models]):
        yield packer.feed(rule([other - start for other in others]).masks)
    yield packer.end()
    figures = [checksum.figure(), *(figure for totals in found for figure in totals)]
    yield Tell(**dict(zip(figure_names(len(models)), figures, strict=True)))
