"""Make one task's model from a base and a store."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from merges.multitask.bits import block_size, blocks, unpacked
from merges.multitask.identity import Checksum
from merges.multitask.store import MASKS, SHARED, Store, factors, read_store
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.errors import CheckpointError, ResultError
from surgery.plan import Plan, Step, TensorSpec, check_plan
from surgery.quantised import dequantised

OTHER_BASE = "is not what it was in the base that the store was made from"
VECTORS = 8  # float64 vectors of a block that a step holds


def restore_task(base: Checkpoint, store: Checkpoint, *, task: str) -> Plan:
    """Return the plan of a task's model: base + factor * mask * shared vector.

    The result is an ordinary checkpoint. The run stops where the base's weights are not those
    that the store was made from.

    Raises:
        RecipeError: the store holds no such task.
        CheckpointError: it is no store, or the base is another model.
    """
    found, plain = read_store(store), dequantised(base)
    number = found.task(task)
    factor = 1.0 if found.is_planned else factors(found)[number]
    steps = {name: _restored(found, plain, name, number, factor) for name in found.names} | {
        name: _copied(store.tensors[name]) for name in found.copied
    }
    used = set(found.names.values())
    return check_plan(
        Plan(
            operation=f"{found.kind} task",
            parameters={"task": task},
            sources=(plain, store),
            steps=tuple(steps.values()),
            order=tuple(dict.fromkeys([*(n for n in plain.tensors if n in steps), *steps])),
            config=found.config,
            carried=base.carried if found.config is not None else (),
            dropped={name: "the store holds it" for name in plain.tensors if name not in used},
            facts={"kind": found.kind, "factor": factor},
            notes=base.notes,
        )
    )


def _copied(tensor: TensorInfo) -> Step:
    return Step(inputs=(tensor,), outputs=((tensor.name, TensorSpec(tensor.dtype, tensor.shape)),))


def _restored(store: Store, base: Checkpoint, name: str, task: int, factor: float) -> Step:
    shared, masks = (store.checkpoint.tensors[mark + name] for mark in (SHARED, MASKS))
    own = base.tensors.get(store.names[name])
    if own is None or own.shape != shared.shape:
        fact = "has no such tensor" if own is None else f"has it as {list(own.shape)}"
        remedy = "name the base that the store was made from"
        raise CheckpointError(base.ref, f"{store.names[name]}: {fact}", remedy)
    call = partial(
        _restore,
        name=name,
        task=task,
        factor=factor,
        is_model=store.kind == "emr",
        wanted=None if store.is_planned else store.told[SHARED + name]["_base"],
    )
    return Step(
        outputs=((name, TensorSpec(shared.dtype, shared.shape)),),
        inputs=(own, shared, masks),
        fn=call,
        streamed=True,
        scratch=8 * block_size(shared.shape) * VECTORS,
        why=f"{store.kind} task",
        key=repr((task, factor)),
    )


def _restore(
    base: Any,  # noqa: ANN401 - Stored
    shared: Any,  # noqa: ANN401
    masks: Any,  # noqa: ANN401
    *,
    name: str,
    task: int,
    factor: float,
    is_model: bool,
    wanted: float | None,
) -> Iterator[Any]:
    """Yield the task's tensor in order; at its end, refuse another base."""
    checksum, at = Checksum(), 0
    for start, kept in blocks([base, shared]):
        checksum.feed(start)
        vector = kept - start if is_model else kept
        vector.mul_(unpacked(masks, task, at, start.numel())).mul_(-factor)
        yield start - vector.add_(0.0)
        at += start.numel()
    if checksum.figure() != wanted:
        raise ResultError(name, OTHER_BASE, "name that base with --base")
