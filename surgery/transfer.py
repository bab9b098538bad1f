"""Move what fine-tuning changed onto another base: W = C + ratio * (B - A)."""

import math
from collections.abc import Iterator
from typing import Any

from surgery.anatomy import anatomy
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.compute import COMPUTABLE
from surgery.errors import CheckpointError, RecipeError
from surgery.plan import Plan, Step, TensorSpec, check_plan

KEPT = "kept as the new base has it"
SKIP = "--skip-embeddings keeps those of the new base"


def transfer(
    new_base: Checkpoint,
    tuned: Checkpoint,
    old_base: Checkpoint,
    *,
    ratio: float = 1.0,
    skip_embeddings: bool = False,
) -> Plan:
    """Add the difference of a tuned model from its base to another base, in one pass.

    float32 inside (float64 for a float32 base), one rounding. Config, tokenizer and dtypes are
    the new base's. What is not stored as floating-point numbers is kept as the new base has it.

    Args:
        new_base: C, the donor of everything but the difference.
        tuned: B, fine-tuned from A.
        old_base: A.
        ratio: of the difference that is added; negative takes it away.
        skip_embeddings: keep embedding and output head of the new base.

    Raises:
        RecipeError: the three do not fit together.

    Source: "Efficient Model Development through Fine-tuning Transfer", arXiv 2503.20110,
    section 2; "Chat Vector", arXiv 2310.04799, section 3.
    """
    if not math.isfinite(ratio):
        raise RecipeError(f"--ratio {ratio}", "is not a number", "1 moves the whole difference")
    skipped = _embeddings(new_base, tuned, old_base) if skip_embeddings else frozenset()
    _check_names(new_base, tuned, old_base, skipped)
    notes = [] if skip_embeddings else list(_vocabulary(new_base, old_base))
    steps, dropped = [], {}
    for name, tensor in new_base.tensors.items():
        others = (tuned.tensors.get(name), old_base.tensors.get(name))
        inputs = tuple(t for t in (tensor, *others) if t is not None)
        if name in skipped or not all(t.dtype in COMPUTABLE for t in inputs):
            steps.append(_kept(tensor))
            dropped[name] = KEPT
        else:
            steps.append(_moved(inputs, ratio))
    dropped |= {n: KEPT for o in (tuned, old_base) for n in o.tensors if n in skipped}
    integers = [name for name in dropped if name not in skipped]
    if integers:
        notes.append(
            f"{len(integers)} tensors that are no floats are the new base's: {integers[0]}"
        )
    plan = Plan(
        operation="transfer",
        parameters={"ratio": ratio, "skip_embeddings": skip_embeddings},
        sources=(new_base, tuned, old_base),
        steps=tuple(steps),
        order=tuple(new_base.tensors),
        config=new_base.config,
        carried=new_base.carried,
        dropped=dropped,
        notes=(*new_base.notes, *notes),
    )
    return check_plan(plan)


def _kept(tensor: TensorInfo) -> Step:
    return Step(inputs=(tensor,), outputs=((tensor.name, TensorSpec(tensor.dtype, tensor.shape)),))


def _moved(inputs: tuple[TensorInfo, ...], ratio: float) -> Step:
    def add(new: Any, tuned: Any, old: Any) -> Any:  # noqa: ANN401 - arrays of any library
        return new + (tuned - old) * ratio

    tensor = inputs[0]
    return Step(
        inputs=inputs,
        outputs=((tensor.name, TensorSpec(tensor.dtype, tensor.shape)),),
        fn=add,
        elementwise=True,
        plain=True,
        why="transfer",
        key=repr(ratio),
    )


def _embeddings(*sources: Checkpoint) -> frozenset[str]:
    """Name embeddings and output heads, as each of the models calls them."""
    found = []
    for source in sources:
        parts = anatomy(source)
        found += [name for name in (parts.embedding, parts.head) if name is not None]
    return frozenset(found)


def _check_names(
    new_base: Checkpoint, tuned: Checkpoint, old_base: Checkpoint, skipped: frozenset[str]
) -> None:
    for source in (old_base, tuned):
        for here, there in ((new_base, source), (source, new_base)):
            lost = next((n for n in here.tensors if n not in {*there.tensors, *skipped}), None)
            if lost is not None:
                fact = f"has no tensor {lost!r}, which {here.ref} has"
                raise RecipeError(there.ref, fact, "all three must be of one architecture")
        for name, tensor in new_base.tensors.items():
            if name not in skipped:
                _check_shape(new_base, source, tensor, source.tensors[name])


def _check_shape(
    new_base: Checkpoint, source: Checkpoint, tensor: TensorInfo, other: TensorInfo
) -> None:
    if tensor.shape == other.shape:
        return
    told = f"has {tensor.name} of shape {list(other.shape)}, {new_base.ref} {list(tensor.shape)}"
    rows = tensor.shape[1:] == other.shape[1:] and tensor.name in _embeddings(new_base)
    remedy = SKIP if rows else "all three must be of one architecture"
    raise RecipeError(source.ref, told, remedy)


def _vocabulary(new_base: Checkpoint, old_base: Checkpoint) -> Iterator[str]:
    """Refuse bases whose rows stand for other tokens; say where that cannot be told."""
    from surgery.vocabulary.read import read_vocabulary, tokenizer_files

    if not tokenizer_files(new_base) or not tokenizer_files(old_base):
        return
    try:
        new, old = read_vocabulary(new_base).ids, read_vocabulary(old_base).ids
    except CheckpointError as error:
        yield f"the vocabularies of the bases were not compared: {error}"
        return
    other = sorted(t for t in {*new, *old} if new.get(t) != old.get(t))
    if other:
        first = f"{other[0]!r} is {new.get(other[0])} there and {old.get(other[0])} here"
        fact = (
            f"has another vocabulary than {new_base.ref}: {first}, and so are {len(other)} in all"
        )
        raise RecipeError(old_base.ref, fact.replace(", and so are 1 in all", ""), SKIP)
