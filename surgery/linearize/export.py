"""A linearized model in the layout of a class that others serve, where that is the same model."""

from types import ModuleType
from typing import Literal

from surgery.checkpoint import Checkpoint
from surgery.errors import RecipeError
from surgery.linearize import fla, qwen3_next
from surgery.plan import Plan, check_plan

To = Literal["fla", "qwen3-next"]
LAYOUTS: dict[str, ModuleType] = {"fla": fla, "qwen3-next": qwen3_next}


def export(linearized: Checkpoint, *, to: To) -> Plan:
    """Plan a checkpoint of another class that computes what this one does.

    Numbers are copied, repeated, doubled or lessened by 1; nothing is approximated.

    Args:
        linearized: made by `surgery linearize`.
        to: `fla`, GLAForCausalLM of flash-linear-attention 0.6, for the method gla with all layers
            linear; `qwen3-next`, Qwen3NextForCausalLM of transformers, for gated-delta made from
            Qwen3, with softmax attention kept in one layer or more.

    Raises:
        RecipeError: there is no such layout.
        PlanError: the model cannot be expressed in it, with the reason.
        CheckpointError: config and tensors disagree.
    """
    if to not in LAYOUTS:
        raise RecipeError(f"--to {to}", "is no layout", f"known are {', '.join(LAYOUTS)}")
    layout = LAYOUTS[to]
    opened = layout.open_for(linearized)
    steps = tuple(layout.steps(opened))
    used = {part.name for step in steps for part in step.stored}
    unused = "of softmax attention alone, which the layer no longer has"
    return check_plan(
        Plan(
            operation="export",
            parameters={"to": to},
            sources=(linearized,),
            steps=steps,
            order=tuple(name for step in steps for name, _ in step.outputs),
            config=layout.config(opened),
            carried=tuple(path for path in linearized.carried if path.suffix != ".py"),
            dropped={name: unused for name in linearized.tensors if name not in used},
            notes=(*linearized.notes, *layout.notes(opened)),
        )
    )
