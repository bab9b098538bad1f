"""A base with adapters written out as an ordinary model."""

from surgery.checkpoint import Checkpoint
from surgery.errors import RecipeError
from surgery.plan import Plan, Step, TensorSpec, check_plan


def fuse(adapted: Checkpoint) -> Plan:
    """Write out a base with adapters: W + scale * B @ A where an adapter says so, else bytes.

    float32 inside (float64 for a float32 base), one rounding to the base's dtype.

    Args:
        adapted: opened as `BASE+ADAPTER`.

    Raises:
        RecipeError: there is no adapter to fuse.

    Source: "LoRA", arXiv 2106.09685, section 4.1; with DoRA's magnitudes arXiv 2402.09353,
    equation 5; with use_rslora the scale alpha / sqrt(r), arXiv 2312.03732.
    """
    if not adapted.adapters:
        fact = "names no adapter, so there is nothing to fuse"
        raise RecipeError(adapted.ref, fact, "name both: BASE+ADAPTER")
    steps = tuple(
        Step(
            inputs=(tensor,),
            outputs=((name, TensorSpec(tensor.dtype, tensor.shape)),),
            why=getattr(tensor, "why", "copy"),
        )
        for name, tensor in adapted.tensors.items()
    )
    plan = Plan(
        operation="lora fuse",
        parameters={},
        sources=(adapted,),
        steps=steps,
        order=tuple(adapted.tensors),
        config=adapted.config,
        carried=adapted.carried,
        facts={"adapters": list(adapted.adapters)},
        notes=adapted.notes,
    )
    return check_plan(plan)
