"""The output as a whole: its tensors in order, its layers, what is left behind."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from surgery.checkpoint import stored_tensors
from surgery.errors import PlanError
from surgery.layers.config import layer_facts
from surgery.layers.kinds import check_kinds
from surgery.method import Method
from surgery.recipe.inputs import Model
from surgery.recipe.lanes import Lane, open_lanes
from surgery.recipe.outline import Output, is_computed, sliced_outputs, whole_outputs
from surgery.recipe.schema import Recipe
from surgery.recipe.settings import Position
from surgery.recipe.towers import tower


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What the output is made of.

    Attributes:
        donor: the model that config and files come from.
        outputs: in the order of the file.
        layers: of the output; None where the models have no one stack.
        layer_map: per new layer the donor's that it stands for; None for models merged whole.
        lanes: how many slices there are in all.
        dropped: tensors of sources that reach no output, with the reason.
        unties: the output has a head of its own where the donor has none.
    """

    donor: Model
    outputs: tuple[Output, ...]
    layers: int | None
    lanes: int
    layer_map: tuple[int, ...] | None = None
    dropped: Mapping[str, str] = field(default_factory=dict)
    unties: bool = False
    notes: tuple[str, ...] = ()

    def depth(self, output: Output) -> float | None:
        """Return 0 for a tensor of the first layer, 1 for the last; None outside."""
        if output.layer is None or self.layers is None:
            return None
        return output.layer / (self.layers - 1) if self.layers > 1 else 0.0

    def is_vocabulary(self, output: Output) -> bool:
        """Whether an output is an embedding or a head."""
        parts = self.donor.parts
        return parts is not None and (
            output.name in (parts.embedding, parts.head) or self._is_new_head(output.name)
        )

    def _is_new_head(self, name: str) -> bool:
        return self.unties and name not in self.donor.tensors


def lay_out_recipe(recipe: Recipe, models: Mapping[str, Model], method: Method) -> Layout:
    """Find the outputs of a recipe and the inputs of each.

    Raises:
        PlanError: the models do not fit together.
    """
    donor = models[recipe.donor]
    lanes = open_lanes(recipe, models, method)
    used = [model for every in lanes.values() for lane in every for model in lane.models]
    tied = _tied_head(donor, used)
    outputs = [o for o in _outputs(recipe, lanes, donor) if o.name != tied]
    layer_map = _layer_map(lanes, donor)
    dropped = dict(_dropped(models, outputs, used, donor, tied=tied, sliced=layer_map is not None))
    unties = donor.parts is not None and donor.parts.tied and _has_new_head(outputs, donor, used)
    return Layout(
        donor=donor,
        outputs=tuple(outputs),
        layers=len(layer_map) if layer_map else donor.parts.layers if donor.parts else None,
        lanes=sum(len(every) for every in lanes.values()),
        layer_map=layer_map,
        dropped=dropped,
        unties=unties,
        notes=tuple(_notes(donor, used, tied=tied, unties=unties)),
    )


def _outputs(recipe: Recipe, lanes: Mapping[str, Sequence[Lane]], donor: Model) -> Iterator[Output]:
    claimed: dict[str, str] = {}
    for module in recipe.modules:
        belongs = tower(module, donor)
        for output in _of_module(lanes[module.name], donor, belongs):
            if output.name in claimed:
                fact = f"and {claimed[output.name]} both hold {output.name}"
                raise PlanError(f"{module.place}", fact, "let each tensor be of one module")
            claimed[output.name] = module.name
            yield output
    rules = [tower(module, donor) for module in recipe.modules]
    for name, tensor in donor.tensors.items():
        if not any(belongs(name) for belongs in rules):
            yield Output(name=name, lane=None, inputs=(tensor,), at=Position((name,), None))


def _of_module(
    lanes: Sequence[Lane], donor: Model, belongs: Callable[[str], bool]
) -> Iterator[Output]:
    if lanes[0].module.whole:
        yield from whole_outputs(lanes[0], donor, belongs=belongs)
    else:
        yield from sliced_outputs(lanes, donor, belongs=belongs)


def _tied_head(donor: Model, used: Sequence[Model]) -> str | None:
    """Name a stored head that every model's config ties to the embedding."""
    everywhere = all(model.says_tied for model in (donor, *used))
    return donor.head if everywhere and donor.parts and donor.parts.embedding else None


def _has_new_head(outputs: Sequence[Output], donor: Model, used: Sequence[Model]) -> bool:
    heads = {model.head for model in used if model.head}
    return any(o.name in heads and o.name not in donor.tensors for o in outputs)


def _layer_map(lanes: Mapping[str, Sequence[Lane]], donor: Model) -> tuple[int, ...] | None:
    """Return which of the donor's layers each new one stands for, where slices choose them.

    Raises:
        PlanError: the donor has no such layer, or its config says something else of it.
    """
    sliced = [every for every in lanes.values() if not every[0].module.whole]
    if not sliced:
        return None
    found: list[int] = []
    for lane in sliced[0]:
        at = next((n for n, model in enumerate(lane.models) if model is donor), lane.lead)
        begin, end = lane.sources[at].layers or (0, 0)
        if end > donor.anatomy.layers:
            fact = f"takes layer {end - 1}, and the config comes from {donor.ref}, which has none"
            raise PlanError(lane.slice.place, fact, "name a deeper model as donor")
        _check_facts(lane, donor, begin, end)
        found += range(begin, end)
    if any(b != a + 1 for a, b in pairwise(found)) or found[0]:
        for model in {id(m): m for lane in sliced[0] for m in lane.models}.values():
            check_kinds(model.checkpoint, model.anatomy)
    return tuple(found)


def _check_facts(lane: Lane, donor: Model, begin: int, end: int) -> None:
    """Refuse a layer of which its own config says something else than the donor's will."""
    if donor.checkpoint.config is None:
        return
    told = layer_facts(dict(donor.checkpoint.config), donor.anatomy)[begin:end]
    for source, model in zip(lane.sources, lane.models, strict=True):
        if model.checkpoint.config is None or source.layers is None:
            continue
        own = layer_facts(dict(model.checkpoint.config), model.anatomy)[slice(*source.layers)]
        for n, (mine, theirs) in enumerate(zip(own, told, strict=True)):
            if len(mine) == len(theirs) and mine != theirs:
                kinds = next(f"{a}, not {b}" for a, b in zip(mine, theirs, strict=True) if a != b)
                number = source.layers[0] + n
                fact = f"layer {number} of {model.ref} is {kinds}, as layer {begin + n} is"
                remedy = "take layers that are of one kind"
                raise PlanError(source.place, f"{fact} in {donor.ref}", remedy)


def _dropped(
    models: Mapping[str, Model],
    outputs: Sequence[Output],
    used: Sequence[Model],
    donor: Model,
    *,
    tied: str | None,
    sliced: bool,
) -> Iterator[tuple[str, str]]:
    """Yield tensors that reach no output, with the reason."""
    stored = [part for o in outputs for tensor in o.inputs for part in stored_tensors(tensor)]
    taken = {(part.file, part.name) for part in stored}
    for model in models.values():
        for name, tensor in model.tensors.items():
            if all((part.file, part.name) in taken for part in stored_tensors(tensor)):
                continue
            layer = model.layer_of(name)
            if not any(model is other for other in used):
                yield name, "only config, files or vocabulary of its model are used"
            elif name == tied or (model.says_tied and name == model.head):
                yield name, "is tied to the embedding"
            elif is_computed(name):
                yield name, "is made anew by every model"
            elif sliced and layer is not None:
                yield name, f"layer {layer} is in no slice"
            elif sliced:
                yield name, "is taken from the models of another slice"
            else:
                yield name, f"is no part of what is merged; {donor.checkpoint.name}'s own is kept"


def _notes(donor: Model, used: Sequence[Model], *, tied: str | None, unties: bool) -> Iterator[str]:
    models = {model.ref: model for model in (donor, *used)}.values()
    tying = [m.ref for m in models if m.parts and m.parts.tied]
    own = [m.ref for m in models if m.head]
    if tying and own and not tied:
        told = f"{', '.join(tying)} ties the head to the embedding, {', '.join(own)} does not"
        yield f"{told}: the output has a head of its own" + (", unlike the donor" if unties else "")
