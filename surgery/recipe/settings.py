"""Parameters as they are written, and the one number that each tensor gets."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from surgery.errors import RecipeError
from surgery.method import Parameter, Scalar

TRUE = ("true", "on", "yes", "y", "t", "1")
FALSE = ("false", "off", "no", "n", "f", "0")


@dataclass(frozen=True, slots=True)
class Filter:
    """Which tensors an entry is for: a part of their names, a glob or a regular expression."""

    kind: Literal["substring", "glob", "regex"]
    text: str

    def matches(self, name: str) -> bool:
        """Whether the tensor of that name is meant."""
        if self.kind == "substring":
            return self.text in name
        if self.kind == "glob":
            return fnmatchcase(name, self.text)
        return re.search(self.text, name) is not None

    def __str__(self) -> str:
        return self.text if self.kind == "substring" else f"{self.kind} {self.text}"


@dataclass(frozen=True, slots=True)
class Entry:
    """A value or a gradient over depth, for all tensors or those of a filter.

    Attributes:
        values: one, or several that are spread evenly over the layers of the slice.
        place: where it was written.
    """

    values: tuple[Scalar, ...]
    place: str
    filter: Filter | None = None


Settings = Mapping[str, tuple[Entry, ...]]


@dataclass(frozen=True, slots=True)
class Decided:
    """A parameter's value for one tensor.

    Attributes:
        why: the place and what decided there, in words.
    """

    value: Scalar
    why: str


@dataclass(frozen=True, slots=True)
class Position:
    """Where a tensor stands for parameters.

    Attributes:
        names: of the output; a head that is the embedding has two.
        share: 0 for the first layer of the slice, 1 for its last; None outside the layers.
    """

    names: tuple[str, ...]
    share: float | None


def decide(
    parameter: Parameter, levels: Sequence[Settings], at: Position, *, place: str
) -> Decided:
    """Return a parameter's value for a tensor: the first level with a fitting entry decides.

    Args:
        levels: from the closest (a model of a slice) to the widest (the whole recipe).
        place: what to name where a required parameter has no value.

    Raises:
        RecipeError: no value, or one of another type or out of range.
    """
    for settings in levels:
        for entry in settings.get(parameter.name, ()):
            if entry.filter is None or any(entry.filter.matches(name) for name in at.names):
                return _decided(parameter, entry, at)
    if parameter.required:
        raise missing(parameter, place, f" for {at.names[0]}, which no filter fits")
    return Decided(parameter.default, "the default")


def missing(parameter: Parameter, place: str, why: str = "") -> RecipeError:
    """Return the error of a required parameter without a value."""
    fact = f"has no value for the parameter {parameter.name}{why}"
    help_ = f": {parameter.bounds.help}" if parameter.bounds.help else ""
    flag = f"--{parameter.name.replace('_', '-')}"
    return RecipeError(place, fact, f"give {parameter.name} ({flag}){help_}")


def _decided(parameter: Parameter, entry: Entry, at: Position) -> Decided:
    values = check_entry(parameter, entry)
    share = at.share or 0.0  # outside the layers the first value holds, as in the peer
    value = interpolate(values, share, kind=parameter.kind)
    why = entry.place
    if entry.filter:
        why += f", filter {entry.filter}"
    if len(values) > 1:
        told = f"at {share:.3g} of the gradient" if at.share is not None else "its first value"
        why += f", {told}"
    return Decided(parameter.check(value, entry.place), why)


def check_entry(parameter: Parameter, entry: Entry) -> tuple[Scalar, ...]:
    """Return the values of an entry in the parameter's type.

    Raises:
        RecipeError: another type, or out of range.
    """
    values = tuple(coerce(value, parameter) for value in entry.values)
    for value in values:
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(entry.place, f"{parameter.name} is {value}", "give a finite number")
    return tuple(parameter.check(value, entry.place) for value in values)


def coerce(value: Scalar, parameter: Parameter) -> Scalar:
    """Read a value as the peer does: `1e-5` and `0.5` in quotes are numbers, `off` is false.

    What cannot be read is returned as it is; `Parameter.check` refuses it.
    """
    if parameter.kind is bool or parameter.bounds.switch:
        word = str(value).lower()
        return True if word in TRUE else False if word in FALSE else value
    if parameter.kind is str or value is None:
        return value
    if isinstance(value, bool):
        return int(value)
    try:
        number = float(value)
        whole = parameter.kind is int and number.is_integer()
    except (ValueError, OverflowError):
        return value
    return int(number) if whole else value if parameter.kind is int else number


def interpolate(values: Sequence[Scalar], share: float, *, kind: type) -> Scalar:
    """Return the value at `share` of evenly spread ones: numbers on a line, others in steps."""
    last = len(values) - 1
    at = share * last
    low = min(int(at), last)
    first, second = values[low], values[min(low + 1, last)]
    if kind is not float or first is None or second is None:
        return first
    weight = at - low
    return float(first) * (1 - weight) + float(second) * weight if weight else first


def parse_settings(value: object, place: "Places") -> dict[str, tuple[Entry, ...]]:
    """Read a `parameters` table.

    Raises:
        RecipeError: not a table, or an entry of no known form.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RecipeError(place(), "is no table of parameters", "write for instance weight: 0.5")
    return {name: _entries(given, place.below(name)) for name, given in value.items()}


@dataclass(frozen=True, slots=True)
class Places:
    """Tells the place of what lies below a path of a document."""

    document: Any
    path: tuple[str | int, ...] = ()

    def __call__(self, *path: str | int) -> str:
        """Return the place in words."""
        told: str = self.document.place(*self.path, *path)
        return told

    def below(self, *path: str | int) -> "Places":
        """Return the places below a key."""
        return Places(self.document, (*self.path, *path))


def _entries(given: object, place: Places) -> tuple[Entry, ...]:
    if isinstance(given, dict):
        return (_conditional(given, place),)
    if isinstance(given, list) and any(isinstance(item, dict) for item in given):
        stray = next((n for n, item in enumerate(given) if not isinstance(item, dict)), None)
        if stray is not None:
            remedy = "write all as {filter: ..., value: ...}, or all as numbers"
            raise RecipeError(place(stray), "mixes filters and plain values", remedy)
        return tuple(_conditional(item, place.below(n)) for n, item in enumerate(given))
    return (Entry(_values(given, place), place()),)


def _values(given: object, place: Places) -> tuple[Scalar, ...]:
    items = given if isinstance(given, list) else [given]
    if not items:
        raise RecipeError(place(), "is an empty list", "give a number, or a gradient of several")
    for item in items:
        if item is None:
            raise RecipeError(place(), "has no value", "give one, or leave the key out")
        if not isinstance(item, float | int | str):
            raise RecipeError(place(), "is neither a value nor a list of values")
    return tuple(items)


def _conditional(given: Mapping[str, object], place: Places) -> Entry:
    unknown = next((key for key in given if key not in ("filter", "value")), None)
    if unknown is not None:
        fact = f"has the unknown key {unknown!r}"
        raise RecipeError(place(), fact, "an entry has filter and value")
    if "value" not in given:
        raise RecipeError(place(), "has no value", "write {filter: ..., value: ...}")
    return Entry(_values(given["value"], place.below("value")), place(), _filter(given, place))


def _filter(given: Mapping[str, object], place: Places) -> Filter | None:
    found = given.get("filter")
    if found is None or found == "*":
        return None
    if isinstance(found, str) and found:
        return Filter("substring", found)
    if isinstance(found, dict) and len(found) == 1:
        kind, text = next(iter(found.items()))
        if kind == "glob" and isinstance(text, str):
            return Filter("glob", text)
        if kind == "regex" and isinstance(text, str):
            return _regex(text, place)
    remedy = "write a part of tensor names, {glob: PATTERN} or {regex: PATTERN}"
    raise RecipeError(place("filter"), "is no filter", remedy)


def _regex(text: str, place: Places) -> Filter:
    try:
        re.compile(text)
    except re.error as error:
        raise RecipeError(
            place("filter"), f"{text!r} is no regular expression ({error})"
        ) from error
    return Filter("regex", text)
