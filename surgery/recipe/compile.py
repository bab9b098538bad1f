"""Compile a recipe to a plan: every tensor, number, dtype and byte decided from headers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.method import Method, Place, find_method
from surgery.passes import merge_step
from surgery.plan import Plan, Step, TensorSpec, check_plan
from surgery.recipe.config import config_notes, merged_config
from surgery.recipe.inputs import Open, open_models, with_checkpoints
from surgery.recipe.lanes import check_inputs
from surgery.recipe.layout import Layout, lay_out_recipe
from surgery.recipe.mixtures import in_one_layout, matched
from surgery.recipe.outline import Output
from surgery.recipe.parameters import (
    Checked,
    Choice,
    check_given,
    check_settings,
    choose,
    unmatched_filters,
    values_of,
)
from surgery.recipe.parse import parse_recipe
from surgery.recipe.record import recorded
from surgery.recipe.schema import Recipe
from surgery.recipe.tensors import check_shapes, copied_step, is_float, out_dtype
from surgery.recipe.vocabulary import unified

if TYPE_CHECKING:
    from surgery.vocabulary import Unified

OPERATION = "merge"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """A plan, and why its numbers are what they are.

    Attributes:
        choices: per output that is computed, in the plan's order.
    """

    plan: Plan
    choices: Mapping[str, tuple[Choice, ...]]


def compile(recipe: Recipe, *, open: Open = open_checkpoint) -> Plan:
    """Compile a recipe to a plan; no weight is read.

    Args:
        open: opens a model by its reference.

    Raises:
        RecipeError: the recipe asks for something that makes no sense.
        PlanError: the models do not fit together.
        CheckpointError: a model is missing or broken.
    """
    return compile_recipe(recipe, open_one=open).plan


def compile_recipe(recipe: Recipe, *, open_one: Open = open_checkpoint) -> Compiled:
    """Compile a recipe, and keep what decided every number; see `compile`."""
    method = find_method(recipe.method, place=recipe.document.place("merge_method"))
    notes = [*recipe.notes, *check_settings(recipe, method)]
    check_inputs(recipe, method)
    check_given(recipe, method)
    models = open_models(recipe.models, open_one)
    opened = tuple(model.checkpoint for model in models.values())
    models, matching = matched(recipe, in_one_layout(models, recipe.donor))
    vocabulary = unified(recipe, models)
    if vocabulary is not None:
        models = with_checkpoints(models, vocabulary.checkpoints)
        notes += vocabulary.notes
    layout = lay_out_recipe(recipe, models, method)
    notes += unmatched_filters(recipe, [name for o in layout.outputs for name in o.at.names])
    choices: dict[str, tuple[Choice, ...]] = {}
    steps = tuple(_steps(recipe, method, layout, choices))
    sliced = layout.layer_map is not None
    donor = models[recipe.donor].checkpoint
    plan = Plan(
        operation=OPERATION,
        parameters=recorded(recipe, opened),
        sources=tuple(model.checkpoint for model in models.values()),
        steps=steps,
        order=tuple(output.name for output in layout.outputs),
        config=merged_config(vocabulary.config if vocabulary else donor.config, layout, steps),
        carried=vocabulary.carried if vocabulary else donor.carried,
        written=vocabulary.written if vocabulary else {},
        dropped=layout.dropped,
        facts={**_facts(recipe, layout, choices, vocabulary), **matching},
        notes=(
            *notes,
            *layout.notes,
            *config_notes(layout.donor, list(models.values()), sliced=sliced),
            *_source_notes(opened),
        ),
    )
    return Compiled(plan=check_plan(plan), choices=choices)


def _steps(
    recipe: Recipe, method: Method, layout: Layout, choices: dict[str, tuple[Choice, ...]]
) -> Iterator[Step]:
    check = Checked(method)
    for output in layout.outputs:
        check_shapes(output)
        if not is_float(output.inputs[0]):
            yield copied_step(output)
        elif output.lane is None:
            yield copied_step(output, dtype=out_dtype(recipe, output))
        else:
            chosen = choices[output.name] = choose(output, recipe, method)
            values = values_of(chosen)
            check(values, output)
            yield _merged(recipe, method, layout, output, values)


def _merged(
    recipe: Recipe, method: Method, layout: Layout, output: Output, values: Mapping[str, Any]
) -> Step:
    lane = output.lane
    assert lane is not None  # noqa: S101 - told by the caller
    spec = TensorSpec(out_dtype(recipe, output), output.inputs[0].shape)
    if method.name == "passthrough" and values.get("scale") in {None, 1.0}:
        return copied_step(output, dtype=spec.dtype)
    place = Place(
        name=output.name,
        depth=layout.depth(output),
        seed=recipe.seed,
        group=f"{lane.number}/" if layout.lanes > 1 else "",
        vocabulary=layout.is_vocabulary(output),
    )
    return merge_step(
        method,
        name=output.name,
        spec=spec,
        base=None if lane.base is None else output.inputs[lane.base],
        models=[output.inputs[n] for n in lane.numbers],
        values=values,
        place=place,
    )


def _facts(
    recipe: Recipe,
    layout: Layout,
    choices: Mapping[str, tuple[Choice, ...]],
    vocabulary: "Unified | None",
) -> dict[str, Any]:
    facts: dict[str, Any] = {"method": recipe.method, "seed": recipe.seed}
    if layout.layer_map is not None:
        facts["layer_map"] = list(layout.layer_map)
    if vocabulary is not None and vocabulary.facts:
        facts["vocabulary"] = dict(vocabulary.facts)
    return {**facts, "resolved": resolved(choices)}


def resolved(choices: Mapping[str, tuple[Choice, ...]]) -> dict[str, Any]:
    """Return each parameter's value where it is one for all tensors, else one per tensor."""
    found: dict[str, dict[str, Any]] = {}
    for name, chosen in choices.items():
        for choice in chosen:
            value = choice.value
            value = list(value) if isinstance(value, tuple) else value
            found.setdefault(choice.parameter.name, {})[name] = value
    return {
        parameter: first if all(v == first for v in table.values()) else table
        for parameter, table in found.items()
        for first in [next(iter(table.values()))]
    }


def _source_notes(sources: Sequence[Checkpoint]) -> Iterator[str]:
    for source in sources:
        yield from (f"{source.name}: {note}" for note in source.notes)


def compile_recorded(
    *sources: Checkpoint, recipe: Mapping[str, Any], models: Sequence[str]
) -> Plan:
    """Compile what a record tells, its inputs opened in their order.

    Raises:
        RecipeError: the record does not fit its inputs.
    """
    opened = dict(zip(models, sources, strict=True))
    return compile(parse_recipe(recipe), open=lambda ref: opened[ref])
