"""A factored model back as a stock one: every product multiplied out."""

from collections.abc import Iterator
from typing import Any

from growth.factor.ask import FACTORED
from growth.factor.config import MODELLING_FILE, stock_config
from growth.factor.form import FACTORS, SPARSE, Form, read_form
from growth.factor.numbers import dense
from surgery.alignment.groups import INPUTS_FIRST
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.errors import CheckpointError, PlanError
from surgery.plan import Plan, Step, TensorSpec, check_plan

PARTS = (*FACTORS, *SPARSE)


def materialize(factored: Checkpoint) -> Plan:
    """Write every factored map as one matrix again, what its factors stand for, rounded once.

    Raises:
        PlanError: it is no factored model.
        CheckpointError: it is damaged.
    """
    config = _config(factored)
    found: dict[str, dict[str, TensorInfo]] = {name: {} for name in config["factored"]}
    for name, tensor in factored.tensors.items():
        module, _, part = name.rpartition(".")
        if part in PARTS:
            if module not in found:
                fact = "is a factor of a map that the config does not tell of"
                raise CheckpointError(name, fact, "restore the config")
            found[module][part] = tensor
    made = {
        module: read_form(module, config["factored"][module], {k: t.shape for k, t in own.items()})
        for module, own in found.items()
    }
    swapped = config["base_model_type"] in INPUTS_FIRST
    steps = tuple(_steps(factored, found, made, swapped=swapped))
    return check_plan(
        Plan(
            operation="factor materialize",
            parameters={},
            sources=(factored,),
            steps=steps,
            order=tuple(name for step in steps for name, _ in step.outputs),
            config=stock_config(config),
            carried=tuple(path for path in factored.carried if path.name != MODELLING_FILE),
            notes=factored.notes,
        )
    )


def _config(factored: Checkpoint) -> dict[str, Any]:
    config = factored.config or {}
    if config.get("model_type") != FACTORED:
        raise PlanError(factored.ref, "is no factored model", "surgery factor makes one")
    place = factored.root / "config.json"
    for key, kind in (("factored", dict), ("text_config", dict), ("base_model_type", str)):
        if not isinstance(config.get(key), kind):
            raise CheckpointError(place, f"has no usable {key}", "restore the config")
    return config


def _steps(
    factored: Checkpoint,
    found: dict[str, dict[str, TensorInfo]],
    made: dict[str, Form],
    *,
    swapped: bool,
) -> Iterator[Step]:
    """Yield a step for each tensor, a map's where its first factor stands."""
    for name, tensor in factored.tensors.items():
        module, _, part = name.rpartition(".")
        if module not in made or part not in PARTS:
            yield Step(inputs=(tensor,), outputs=((name, TensorSpec(tensor.dtype, tensor.shape)),))
        elif part == FACTORS[0]:
            yield _multiply(module, found[module], made[module], swapped=swapped)


def _multiply(module: str, own: dict[str, TensorInfo], form: Form, *, swapped: bool) -> Step:
    def fn(*stored: Any) -> Iterator[Any]:  # noqa: ANN401 - `Stored` tensors
        product = dense(form, [part[...] for part in stored])
        yield product.T if swapped else product

    shape = form.shape[::-1] if swapped else form.shape
    return Step(
        inputs=tuple(own[part] for part in PARTS if part in own),
        outputs=((f"{module}.weight", TensorSpec(own[FACTORS[0]].dtype, shape)),),
        fn=fn,
        streamed=True,
        scratch=8 * (3 * form.outputs * form.inputs + 2 * form.numbers + 2 * form.entries),
        why="multiply",
        key=repr((form, swapped)),
    )
