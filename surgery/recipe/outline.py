"""Which tensors of which models make each tensor of the output."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from surgery.anatomy import split_layer
from surgery.checkpoint import TensorInfo
from surgery.errors import PlanError, RecipeError
from surgery.method import Method
from surgery.recipe.inputs import Model
from surgery.recipe.schema import Module, Recipe, Slice, Source
from surgery.recipe.settings import Position, Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """A slice with its opened models.

    Attributes:
        sources: in the order of the recipe, the base among them.
        base: the place of the base among the sources, where the method takes one.
    """

    module: Module
    slice: Slice
    sources: tuple[Source, ...]
    models: tuple[Model, ...]
    base: int | None

    @property
    def numbers(self) -> tuple[int, ...]:
        """The places of the sources that are no base."""
        return tuple(n for n in range(len(self.sources)) if n != self.base)

    def levels(self, recipe: Recipe, source: Source | None) -> tuple[Settings, ...]:
        """Return where a parameter is looked for, the closest first."""
        own = (source.settings,) if source else ()
        return (*own, self.slice.settings, self.module.settings, recipe.settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A tensor of the output.

    Attributes:
        inputs: one per source of the lane, in their order.
        at: where it stands for parameters.
        layer: its layer in the output; None outside.
    """

    name: str
    lane: Lane
    inputs: tuple[TensorInfo, ...]
    at: Position
    layer: int | None = None


def lanes(recipe: Recipe, models: Mapping[str, Model], method: Method) -> tuple[Lane, ...]:
    """Pair every slice with its models, the base among them.

    Raises:
        RecipeError: a base is missing, or another number of models than the method takes.
    """
    return tuple(_lane(recipe, module, slice_, models, method) for module, slice_ in recipe.slices)


def check_inputs(recipe: Recipe, method: Method) -> None:
    """Check the number of models and the base of every slice, before any is opened.

    Raises:
        RecipeError: a base is missing, or another number of models than the method takes.
    """
    for module, slice_ in recipe.slices:
        sources, base = _sources(recipe, module, slice_, method)
        _check_count(method, sources, base, slice_.place)


def _lane(
    recipe: Recipe, module: Module, slice_: Slice, models: Mapping[str, Model], method: Method
) -> Lane:
    sources, base = _sources(recipe, module, slice_, method)
    opened = tuple(models[source.model] for source in sources)
    return Lane(module=module, slice=slice_, sources=sources, models=opened, base=base)


def _sources(
    recipe: Recipe, module: Module, slice_: Slice, method: Method
) -> tuple[tuple[Source, ...], int | None]:
    """Return the inputs and the base's place; a base that is not listed is an input too."""
    base = slice_.base or recipe.base
    sources = slice_.sources
    if base is None:
        if method.base == "required":
            remedy = "add base_model: the model that the others were trained from"
            raise RecipeError(slice_.place, f"{method.name} needs a base model", remedy)
        return sources, None
    named = [source.model for source in sources]
    if base not in named and not module.whole and method.base != "none":
        fact = f"does not name the base {base!r}, so its layers are not known"
        raise RecipeError(slice_.place, fact, "add it to the sources, with its layer_range")
    if base not in named and module.whole:
        sources = (Source(model=base, place=f"{slice_.place}, base_model"), *sources)
        named.insert(0, base)
    return sources, named.index(base) if method.base != "none" else None


def _check_count(method: Method, sources: Sequence[Source], base: int | None, place: str) -> None:
    count = len(sources) - (base is not None)
    if method.least <= count <= (method.most or count):
        return
    wanted = f"at least {method.least}" if method.most is None else f"exactly {method.most}"
    beside = " beside the base" if base is not None else ""
    plural = "models" if (method.most or method.least) != 1 else "model"
    fact = f"{method.name} takes {wanted} {plural}{beside}, and there are {count}"
    remedy = "the base is one of them here, as it takes no base" if base is None else ""
    listed = ", ".join(source.model for source in sources)
    raise RecipeError(place, f"{fact} ({listed})", remedy if method.base == "none" else "")


def outputs_of(lane: Lane) -> Iterator[Output]:
    """Yield the outputs of models that are merged whole: every tensor by its name.

    Raises:
        PlanError: a tensor is missing in one model, or another has more.
    """
    first = lane.models[0 if lane.base is None else lane.base]
    names = list(first.tensors)
    for name in names:
        layer = _layer(first, name)
        yield Output(
            name=name,
            lane=lane,
            inputs=tuple(_found(model, name, first) for model in lane.models),
            at=Position((name,), _share(layer, first)),
            layer=layer,
        )


def _layer(model: Model, name: str) -> int | None:
    if model.parts is None:
        return None
    inside = split_layer(name, model.parts.stack.prefix)
    return inside[0] if inside and inside[0] < model.parts.layers else None


def _share(layer: int | None, model: Model) -> float | None:
    if layer is None or model.parts is None:
        return None
    return layer / (model.parts.layers - 1) if model.parts.layers > 1 else 1.0


def _found(model: Model, name: str, first: Model) -> TensorInfo:
    found = model.find(name)
    if found is None:
        fact = f"has no tensor {name!r}, which {first.ref} has"
        raise PlanError(model.ref, fact, "merge models of one architecture")
    return found
