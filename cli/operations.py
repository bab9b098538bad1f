"""The operations that a record can name: how each opens its inputs and makes its plan.

A new operation that writes checkpoints adds a row.
"""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import open_checkpoint
from surgery.errors import CheckpointError
from surgery.reproduce import Operation

if TYPE_CHECKING:
    from surgery.plan import Plan

# Operation: the function that makes its plan from opened inputs and the recorded parameters.
PLANS = {
    "stack": "growth.stack:stack",
    "expand": "growth.expand:expand",
    "prune": "growth.prune:prune",
    "widen": "growth.widen:widen",
    "recurse tie": "growth.recurse.tying:tie",
    "recurse relax": "growth.recurse.tying:relax",
    "recurse materialize": "growth.recurse.unroll:materialize",
    "recurse untie": "growth.recurse.unroll:untie",
    "laco": "growth.laco:collapse",
    "prune width": "growth.narrow:narrow",
    "sparsify": "growth.sparsify:sparsify",
    "factor": "growth.factor.plan:factor",
    "factor materialize": "growth.factor.dense:materialize",
    "upcycle": "growth.upcycle:upcycle",
    "moe": "growth.upcycle.moe:moe",
    "vocab extend": "growth.vocab.extend:extend",
    "vocab trim": "growth.vocab.trim:trim",
    "vocab transplant": "growth.vocab.transplant:transplant",
    "vocab pad": "growth.vocab.pad:pad",
    "context": "growth.context:context",
    "merge": "surgery.recipe.compile:compile_recorded",
    "transfer": "surgery.transfer:transfer",
    "lora extract": "surgery.lora.extract:extract",
    "lora merge": "surgery.lora.combine:merge",
    "lora fuse": "surgery.lora.fuse:fuse",
    "coalesce": "growth.levels:coalesce",
    "decoalesce": "growth.levels:decoalesce",
    "interpolate": "growth.levels:interpolate",
    "tleg": "growth.tleg:tleg",
    "lesa": "growth.lesa:lesa",
    "align": "surgery.alignment:align",
    "emr build": "merges.multitask:build_store",
    "emr task": "merges.multitask:restore_task",
    "tall build": "merges.multitask:build_store",
    "tall task": "merges.multitask:restore_task",
    "export": "surgery.linearize.export:export",
    "recover": "surgery.recover.output:healed",
    "linearize": "surgery.linearize.convert:linearize",
    "linearize stages": "surgery.linearize.assembled:assembled",
    "convert": "surgery.convert:convert",
}

# Operation: the function that opens its inputs, where they are no checkpoints.
OPENERS = {
    "convert": "surgery.convert:open_pickle",
    "lora merge": "surgery.checkpoint.adapter_source:open_adapter_source",
}


def find_operation(name: str) -> Operation:
    """Return the operation of that name.

    Raises:
        CheckpointError: this version has none.
    """
    if name not in PLANS:
        known = ", ".join(PLANS)
        fact = "is an operation that this version does not have"
        raise CheckpointError(name, fact, f"it has {known}")
    compile_plan: Callable[..., Plan] = _load(PLANS[name])
    opener = _load(OPENERS[name]) if name in OPENERS else open_checkpoint
    return Operation(compile_plan=compile_plan, open_input=opener)


def _load(place: str) -> Any:  # noqa: ANN401 - a function
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
