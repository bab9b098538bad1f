"""Every parameter of a method, decided for every tensor."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import RecipeError
from surgery.method import Method, Parameter
from surgery.recipe.lanes import sources_of
from surgery.recipe.outline import Output
from surgery.recipe.schema import Recipe, Source
from surgery.recipe.settings import Decided, Entry, Settings, check_entry, decide, missing


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One parameter of one tensor.

    Attributes:
        each: one decision per model for a per-model parameter, else one.
        models: the models that `each` is for; empty where it is one for all.
    """

    parameter: Parameter
    each: tuple[Decided, ...]
    models: tuple[str, ...] = ()

    @property
    def value(self) -> Any:  # noqa: ANN401 - a scalar or a tuple of them
        """What the method is given."""
        values = tuple(decided.value for decided in self.each)
        return values if self.parameter.per_model else values[0]


def check_settings(recipe: Recipe, method: Method) -> tuple[str, ...]:
    """Check every setting of a recipe for its name and range, and return what changes nothing.

    Raises:
        RecipeError: an unknown parameter, or a value that it does not take.
    """
    notes: dict[str, None] = {}
    for settings, source in _all_settings(recipe):
        for name, entries in settings.items():
            if name in method.ignored and name not in method.parameters:
                notes[f"{name} is accepted for {method.name} and changes nothing"] = None
                continue
            parameter = method.parameter(name, entries[0].place)
            for entry in entries:
                check_entry(parameter, entry)
            if source is not None and (why := _idle(parameter, source, recipe, method)):
                notes[f"{entries[0].place}: changes nothing, {why}"] = None
    return tuple(notes)


def check_given(recipe: Recipe, method: Method) -> None:
    """Check that every required parameter is given somewhere, before any model is opened.

    Raises:
        RecipeError: one is not, for a model.
    """
    for module, slice_ in recipe.slices:
        sources, base = sources_of(recipe, module, slice_, method)
        wide = (slice_.settings, module.settings, recipe.settings)
        for parameter in method.parameters.values():
            each = is_per_model(parameter, method)
            models = [s for n, s in enumerate(sources) if n != base] if each else [None]
            for source in models if parameter.required else ():
                levels = (source.settings, *wide) if source else wide
                if not any(parameter.name in settings for settings in levels):
                    raise missing(parameter, source.place if source else slice_.place)


def _idle(parameter: Parameter, source: Source, recipe: Recipe, method: Method) -> str:
    """Return why a model's own setting is never looked at, or nothing."""
    if not is_per_model(parameter, method):
        return f"{parameter.name} is one for all models"
    return f"the base has no {parameter.name}" if _is_base(source, recipe, method) else ""


def _all_settings(recipe: Recipe) -> Iterator[tuple[Settings, Source | None]]:
    yield recipe.settings, None
    for module in recipe.modules:
        yield module.settings, None
    for _, slice_ in recipe.slices:
        yield slice_.settings, None
        yield from ((source.settings, source) for source in slice_.sources)


def is_per_model(parameter: Parameter, method: Method) -> bool:
    """Whether a model's own settings count for a parameter: also where there is but one model."""
    return parameter.per_model or (method.base == "none" and method.most == 1)


def _is_base(source: Source, recipe: Recipe, method: Method) -> bool:
    bases = [slice_.base or recipe.base for _, slice_ in recipe.slices if source in slice_.sources]
    return method.base != "none" and source.model in bases


def unmatched_filters(recipe: Recipe, names: Sequence[str]) -> Iterator[str]:
    """Yield a note for every filter that fits no tensor."""
    seen: dict[Entry, None] = {}
    for settings, _ in _all_settings(recipe):
        for entries in settings.values():
            seen.update(dict.fromkeys(e for e in entries if e.filter))
    for entry in seen:
        found = entry.filter
        if found is not None and not any(found.matches(name) for name in names):
            yield f"{entry.place}: the filter {str(found)!r} fits no tensor"


def choose(output: Output, recipe: Recipe, method: Method) -> tuple[Choice, ...]:
    """Decide all parameters of one tensor.

    Raises:
        RecipeError: a required one has no value, or together they make no sense.
    """
    lane = output.lane
    assert lane is not None  # noqa: S101 - what is copied has no parameters
    found = []
    for parameter in method.parameters.values():
        own = is_per_model(parameter, method)
        sources = [lane.sources[n] for n in lane.numbers] if own else [None]
        each = tuple(
            decide(
                parameter,
                lane.levels(recipe, source),
                output.at,
                place=source.place if source else lane.slice.place,
            )
            for source in sources
        )
        models = tuple(source.model for source in sources if source)
        found.append(Choice(parameter=parameter, each=each, models=models))
    return tuple(found)


def values_of(choices: Sequence[Choice]) -> dict[str, Any]:
    """Return the values by keyword, as a method takes them."""
    return {choice.parameter.keyword: choice.value for choice in choices}


class Checked:
    """Checks values together, each combination once."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._seen: set[str] = set()

    def __call__(self, values: Mapping[str, Any], output: Output) -> None:
        """Check the values of one tensor.

        Raises:
            RecipeError: told by the method, with the tensor.
        """
        key = repr(sorted(values.items()))
        if self._method.check is None or key in self._seen:
            return
        self._seen.add(key)
        try:
            self._method.check(values)
        except RecipeError as error:
            where = output.lane.slice.place if output.lane else ""
            place = f"{where}, {error.place} of {output.name}"
            raise RecipeError(place, error.fact, error.remedy) from error
