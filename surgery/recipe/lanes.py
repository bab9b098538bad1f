"""A slice with its opened models, its base among them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from surgery.errors import RecipeError
from surgery.method import Method
from surgery.recipe.inputs import Model
from surgery.recipe.schema import Module, Recipe, Slice, Source
from surgery.recipe.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """A slice with its opened models.

    Attributes:
        number: among all lanes of the recipe.
        sources: in the order of the recipe, the base among them.
        base: the place of the base among the sources, where the method takes one.
    """

    number: int
    module: Module
    slice: Slice
    sources: tuple[Source, ...]
    models: tuple[Model, ...]
    base: int | None

    @property
    def numbers(self) -> tuple[int, ...]:
        """The places of the sources that are no base."""
        return tuple(n for n in range(len(self.sources)) if n != self.base)

    @property
    def pairs(self) -> Iterator[tuple[Source, Model]]:
        """Every source with its model."""
        return zip(self.sources, self.models, strict=True)

    @property
    def lead(self) -> int:
        """The place of the source whose tensors the others are held against."""
        return 0 if self.base is None else self.base

    def levels(self, recipe: Recipe, source: Source | None) -> tuple[Settings, ...]:
        """Return where a parameter is looked for, the closest first."""
        own = (source.settings,) if source else ()
        return (*own, self.slice.settings, self.module.settings, recipe.settings)


def open_lanes(
    recipe: Recipe, models: Mapping[str, Model], method: Method
) -> dict[str, list[Lane]]:
    """Pair every slice of every module with its models."""
    found: dict[str, list[Lane]] = {module.name: [] for module in recipe.modules}
    for number, (module, slice_) in enumerate(recipe.slices):
        sources, base = sources_of(recipe, module, slice_, method)
        opened = tuple(models[source.model] for source in sources)
        found[module.name].append(
            Lane(
                number=number,
                module=module,
                slice=slice_,
                sources=sources,
                models=opened,
                base=base,
            )
        )
    return found


def check_inputs(recipe: Recipe, method: Method) -> None:
    """Check the number of models and the base of every slice, before any is opened.

    Raises:
        RecipeError: a base is missing, or another number of models than the method takes.
    """
    for module, slice_ in recipe.slices:
        sources, base = sources_of(recipe, module, slice_, method)
        _check_count(method, sources, base, slice_.place)


def sources_of(
    recipe: Recipe, module: Module, slice_: Slice, method: Method
) -> tuple[tuple[Source, ...], int | None]:
    """Return the inputs and the base's place; a base that is not listed is an input too.

    Raises:
        RecipeError: the base is missing, or its layers are not known.
    """
    base = slice_.base or recipe.base
    sources = slice_.sources
    if base is None:
        if method.base == "required":
            remedy = "add base_model (--base), the model that the others were trained from"
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
    plural = "models" if (method.most or method.least) != 1 else "model"
    beside = " beside the base" if base is not None else ""
    listed = ", ".join(source.model for at, source in enumerate(sources) if at != base)
    named = f" ({listed})" if listed else ""
    fact = f"{method.name} takes {wanted} {plural}{beside}, and there are {count}{named}"
    remedy = "a base_model counts as one of them here" if method.base == "none" else ""
    raise RecipeError(place, fact, remedy or "change the list of models")
