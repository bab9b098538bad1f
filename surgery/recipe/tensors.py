"""Dtypes and shapes of one output: what is merged, what is copied, and what does not fit."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from surgery.checkpoint import TensorInfo, make_view
from surgery.checkpoint.view import ReadRows, read_rows
from surgery.errors import PlanError, StepError
from surgery.plan import Step, TensorSpec
from surgery.recipe.outline import Output
from surgery.recipe.schema import Recipe

FLOATS = ("F64", "F32", "F16", "BF16")


def is_float(tensor: TensorInfo) -> bool:
    """Whether a tensor holds weights, and no numbers, masks or codes."""
    return tensor.dtype in FLOATS


def out_dtype(recipe: Recipe, output: Output) -> str:
    """Return the output's dtype: the one asked for, else what holds all inputs."""
    return recipe.out_dtype or recipe.dtype or widest([t.dtype for t in output.inputs])


def widest(dtypes: Sequence[str]) -> str:
    """Return the smallest float dtype that holds all of these, as torch promotes them."""
    kinds = set(dtypes)
    if len(kinds) == 1:
        return dtypes[0]
    return "F64" if "F64" in kinds else "F32"


def check_shapes(output: Output) -> None:
    """Refuse inputs that differ in shape or kind.

    Raises:
        PlanError: naming models, tensor and shapes.
    """
    first, refs = output.inputs[0], refs_of(output)
    for ref, tensor in zip(refs, output.inputs, strict=True):
        if tensor.shape != first.shape:
            shapes = f"{list(first.shape)} in {refs[0]} and {list(tensor.shape)} in {ref}"
            raise PlanError(output.name, f"is {shapes}", "merge models of one size")
        if is_float(tensor) != is_float(first):
            told = f"{first.dtype} in {refs[0]} and {tensor.dtype} in {ref}"
            raise PlanError(output.name, f"is {told}", "merge models of one kind")


def refs_of(output: Output) -> tuple[str, ...]:
    """Return the models that the inputs are from."""
    return tuple(model.ref for model in output.lane.models) if output.lane else ("the donor",)


def copied_step(output: Output, *, dtype: str | None = None) -> Step:
    """Return the step that copies one input, or checks that all are equal."""
    first = output.inputs[0]
    spec = TensorSpec(dtype or first.dtype, first.shape)
    if len(output.inputs) > 1:
        return Step(
            outputs=((output.name, spec),), inputs=(_equal_view(output),), why="check equal"
        )
    if dtype not in (None, first.dtype):
        why = f"convert to {dtype}"
        return Step(
            outputs=((output.name, spec),), inputs=(first,), fn=_same, elementwise=True, why=why
        )
    return Step(outputs=((output.name, spec),), inputs=(first,))


def _same(x: Any) -> Any:  # noqa: ANN401 - a tensor
    return x


def _equal_view(output: Output) -> TensorInfo:
    """Return the first input, compared with the others when it is read."""
    first = output.inputs[0]
    refs = refs_of(output)
    return make_view(
        first.name,
        dtype=first.dtype,
        shape=first.shape,
        stored=output.inputs,
        make=partial(_read_equal, inputs=output.inputs, refs=refs),
        why="check equal",
    )


def _read_equal(
    read: ReadRows, start: int, count: int, *, inputs: Sequence[TensorInfo], refs: Sequence[str]
) -> Any:  # noqa: ANN401 - a tensor; torch is not imported here
    first = read_rows(read, inputs[0], start, count)
    for tensor, ref in zip(inputs[1:], refs[1:], strict=True):
        if not read_rows(read, tensor, start, count).equal(first):
            fact = f"holds whole numbers that differ between {refs[0]} and {ref}"
            raise StepError(tensor.name, fact, "such a tensor is copied, not merged: make it equal")
    return first
