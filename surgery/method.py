"""A merge method: declared once, by the signature of a function over tensors.

Positional arguments are tensors: `base` (required, or `base: Tensor | None`), then either
`models: Sequence[Tensor]` or one name per model. Keyword-only arguments are parameters; from
their annotations come validation, the command line's options, help and the reference pages.
torch is imported inside methods only, so that a wrong recipe costs no second.
"""

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Generic,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

from surgery.errors import RecipeError

__all__ = [
    "Method",
    "Param",
    "Parameter",
    "PerModel",
    "Place",
    "Tensor",
    "find_method",
    "merge",
    "method_names",
]

T = TypeVar("T")
if TYPE_CHECKING:
    from torch import Tensor

    PerModel = Sequence[T] | Any  # a default is one value for all
else:
    Tensor = Any

    class PerModel(Generic[T]):
        """Marks a parameter that has one value per model (the base has none)."""


GROUP = "surgery.merges"
Kind = Literal["elementwise", "passes", "whole"]
Scalar = float | int | bool | str | None
WANTED = {float: "a number", int: "a whole number", bool: "true or false", str: "a word"}


@dataclass(frozen=True, slots=True)
class Param:
    """What an annotation says of a parameter beside its type: help and bounds.

    Attributes:
        switch: the words that true and false stand for, where the peer has a switch.
    """

    help: str
    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    switch: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A parameter of a method.

    Attributes:
        name: as users write it (`lambda` for `lambda_`).
        kind: float, int, bool or str.
        choices: the words allowed, of a str.
        optional: None is a value.
        per_model: one value per model.
    """

    name: str
    kind: type
    choices: tuple[str, ...] = ()
    optional: bool = False
    per_model: bool = False
    required: bool = False
    default: Scalar = None
    bounds: Param = Param("")

    @property
    def keyword(self) -> str:
        """The argument's name in Python."""
        return f"{self.name}_" if self.name == "lambda" else self.name

    @property
    def range(self) -> str:
        """The values allowed, in words: `(0, 1]`, `at least 0`, `a or b`; empty for any."""
        if self.choices:
            return " or ".join(self.choices)
        low = self.bounds.gt if self.bounds.gt is not None else self.bounds.ge
        high = self.bounds.lt if self.bounds.lt is not None else self.bounds.le
        if low is None and high is None:
            return ""
        if high is None:
            return f"{'above' if self.bounds.gt is not None else 'at least'} {low:g}"
        if low is None:
            return f"{'below' if self.bounds.lt is not None else 'at most'} {high:g}"
        left, right = "(["[self.bounds.gt is None], ")]"[self.bounds.lt is None]
        return f"{left}{low:g}, {high:g}{right}"

    def check(self, value: object, place: str) -> Scalar:
        """Return the value in the parameter's type.

        Raises:
            RecipeError: another type, or out of range; `place` tells where it was written.
        """
        if value is None and self.optional:
            return None
        if isinstance(value, bool) and self.bounds.switch:
            value = self.bounds.switch[not value]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if self.kind is float and isinstance(value, int) and number:
            value = float(value)
        if not isinstance(value, float | int | str) or type(value) is not self.kind:
            fact = f"{self.name} {value!r} is not {WANTED[self.kind]}"
            raise RecipeError(place, fact, self.range and f"give {self.range}")
        if not self._fits(value):
            both = self.range[:1] in "[("
            fact = f"{self.name} {value} is {'outside' if both else 'not'} {self.range}"
            if self.choices:
                close = get_close_matches(str(value), self.choices, n=1)
                fact = f"{self.name} {value!r} is none of {', '.join(self.choices)}"
                raise RecipeError(place, fact, f"did you mean {close[0]!r}?" if close else "")
            raise RecipeError(place, fact)
        return value

    def _fits(self, value: Any) -> bool:  # noqa: ANN401 - a scalar
        if self.kind is str:
            return not self.choices or value in self.choices
        if self.kind is bool:
            return True
        low, high = self.bounds.ge, self.bounds.le
        over, under = self.bounds.gt, self.bounds.lt
        inside = (low is None or value >= low) and (high is None or value <= high)
        strictly = (over is None or value > over) and (under is None or value < under)
        return inside and strictly and math.isfinite(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a tensor stands, for methods that ask by a keyword-only argument `place`.

    Attributes:
        name: of the output tensor; seeds random masks, decides nothing else.
        depth: 0 for the first layer, 1 for the last; None outside the layers.
        seed: the recipe's.
        group: tells this merge from others in one plan (slices, modules).
        vocabulary: the tensor is an embedding or a head, [tokens, width].
    """

    name: str
    depth: float | None = None
    seed: int = 0
    group: str = ""
    vocabulary: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A declared merge method.

    Attributes:
        fn: the function; a generator function for `passes`.
        kind: how the engine may call it: on slices of any size, in passes, on whole tensors.
        rows: slices are whole rows, always or by the values.
        plain: uses operators and `dots` only, so that numpy arrays do as well as tensors;
            always, or by the values.
        base: whether it takes a base: "required", "optional" or "none".
        least, most: how many models it takes beside the base; None for any number.
        inputs: names of the tensor arguments.
        ignored: parameters that the peer accepts here and that change nothing.
        scratch: vectors of the tensor's size that a whole-tensor method needs beside its inputs.
        holds: of a method whose tensors are read when they are indexed: bytes that it holds, by
            the values, place included, the shape, the number of models and a float's bytes.
        source: where it was published.
        is_random: draws masks; the seed decides.
        groups: tells from the values which groups its passes will ask for, in their order.
        tells: names of the figures that it may tell of a tensor.
        check: raises RecipeError for values that are each in range, and together are not.
    """

    name: str
    fn: Callable[..., Any]
    kind: Kind
    rows: bool | Callable[[Mapping[str, Any]], bool] = False
    plain: bool | Callable[[Mapping[str, Any]], bool] = False
    base: Literal["required", "optional", "none"] = "none"
    least: int = 1
    most: int | None = None
    inputs: tuple[str, ...] = ()
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    scratch: int = 0
    holds: Callable[[Mapping[str, Any], tuple[int, ...], int, int], int] | None = None
    source: str = ""
    is_random: bool = False
    takes_place: bool = False
    groups: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda _: ()
    tells: tuple[str, ...] = ()
    check: Callable[[Mapping[str, Any]], None] | None = None

    @property
    def summary(self) -> str:
        """The first sentence of the docstring."""
        return (inspect.getdoc(self.fn) or "").split("\n\n")[0].replace("\n", " ")

    def parameter(self, name: str, place: str) -> Parameter:
        """Return a parameter by the name users write.

        Raises:
            RecipeError: the method has none of that name.
        """
        if name in self.parameters:
            return self.parameters[name]
        close = get_close_matches(name, self.parameters, n=1)
        has = ", ".join(self.parameters) or "none"
        hint = f"did you mean {close[0]!r}?" if close else f"it has {has}"
        raise RecipeError(place, f"{self.name} has no parameter {name!r}", hint)

    def is_plain(self, values: Mapping[str, Any]) -> bool:
        """Whether numpy arrays do, with these values by keyword."""
        return self.plain(values) if callable(self.plain) else self.plain

    def whole_rows(self, values: Mapping[str, Any]) -> bool:
        """Whether slices are whole rows, with these values by keyword."""
        return self.rows(values) if callable(self.rows) else self.rows

    def call(self, tensors: Sequence[Any], has_base: bool, values: Mapping[str, Any]) -> Any:  # noqa: ANN401
        """Call the function with tensors in the order of a step's inputs, the base first."""
        given = list(tensors)
        arguments = []
        if self.base != "none":
            arguments.append(given.pop(0) if has_base else None)
        names = self.inputs[1:] if self.base != "none" else self.inputs
        return self.fn(*arguments, *([given] if names == ("models",) else given), **values)


def merge(
    *,
    source: str,
    elementwise: bool = False,
    plain: bool | Callable[[Mapping[str, Any]], bool] = False,
    rows: bool | Callable[[Mapping[str, Any]], bool] = False,
    least: int = 1,
    ignored: Sequence[str] = (),
    scratch: int = 4,
    holds: Callable[[Mapping[str, Any], tuple[int, ...], int, int], int] | None = None,
    is_random: bool = False,
    groups: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda _: (),
    tells: Sequence[str] = (),
    check: Callable[[Mapping[str, Any]], None] | None = None,
) -> Callable[[Callable[..., Any]], Method]:
    """Declare a merge method; see the module's docstring and `Method` for what is read off.

    A function sees whole tensors, unless `elementwise` says that slices do as well. A generator
    function is given meta tensors, yields passes over slices (see `surgery.passes`) and returns
    the function of the last one. Where either is `plain` besides, its slices may be numpy arrays,
    which spares a run the loading of torch. With `holds`, a function is given tensors that are
    read when they are indexed (see `surgery.stored`), and yields the result's pieces in order.
    """

    def declare(fn: Callable[..., Any]) -> Method:
        arguments = inspect.signature(fn).parameters.values()
        tensors = [a for a in arguments if a.kind is not inspect.Parameter.KEYWORD_ONLY]
        keywords = [a for a in arguments if a.kind is inspect.Parameter.KEYWORD_ONLY]
        inputs = tuple(a.name for a in tensors)
        base: Literal["required", "optional", "none"] = "none"
        if inputs[0] == "base":
            base = "optional" if "None" in str(tensors[0].annotation) else "required"
        single = len(inputs) - (base != "none") if "models" not in inputs else None
        kind: Kind = "elementwise" if elementwise else "whole"
        declared = [_parameter(a) for a in keywords if a.name != "place"]
        return Method(
            name=fn.__name__,
            fn=fn,
            kind="passes" if inspect.isgeneratorfunction(fn) and holds is None else kind,
            rows=rows,
            plain=plain,
            base=base,
            least=single or least,
            most=single,
            inputs=inputs,
            parameters={p.name: p for p in declared},
            ignored=tuple(ignored),
            scratch=scratch,
            holds=holds,
            source=source,
            is_random=is_random,
            takes_place=any(a.name == "place" for a in keywords),
            groups=groups,
            tells=tuple(tells),
            check=check,
        )

    return declare


def _parameter(argument: inspect.Parameter) -> Parameter:
    annotation, bounds = argument.annotation, Param("")
    if get_origin(annotation) is Annotated:
        annotation, bounds = get_args(annotation)[:2]
    per_model = get_origin(annotation) is PerModel
    if per_model:
        annotation = get_args(annotation)[0]
    optional = get_origin(annotation) in {UnionType, Union}
    if optional:
        annotation = next(a for a in get_args(annotation) if a is not NoneType)
    choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    required = argument.default is inspect.Parameter.empty
    return Parameter(
        name=argument.name.rstrip("_"),
        kind=str if choices else annotation,
        choices=choices,
        optional=optional,
        per_model=per_model,
        required=required,
        default=None if required else argument.default,
        bounds=bounds,
    )


def find_method(name: str, *, place: str = "merge") -> Method:
    """Return the method of that name.

    Raises:
        RecipeError: there is none.
    """
    known = dict(_places())
    if name not in known:
        close = get_close_matches(name.replace("-", "_"), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
        raise RecipeError(place, f"{name!r} is no merge method", hint)
    module, attribute = known[name]
    found = getattr(import_module(module), attribute, None)
    if not isinstance(found, Method):
        raise RecipeError(place, f"{module} holds no merge method {attribute!r}")
    return found


def method_names() -> tuple[str, ...]:
    """Return the names of all methods, ours and those of installed packages."""
    return tuple(name for name, _ in _places())


@cache
def _places() -> tuple[tuple[str, tuple[str, str]], ...]:
    """Return name, module and attribute of every method, without importing any."""
    found: dict[str, tuple[str, str]] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda p: (p.value != "merges", p.name)):
        for name, place in _methods_of(point.name, point.module, point.attr):
            found.setdefault(name, place)
    return tuple(sorted(found.items()))


def _methods_of(name: str, module: str, attribute: str) -> Iterator[tuple[str, tuple[str, str]]]:
    if attribute:
        yield name, (module, attribute)
        return
    package = sys.modules.get(module) or import_module(module)
    for entry in iter_modules(package.__path__):
        if not entry.ispkg:
            yield entry.name, (f"{module}.{entry.name}", entry.name)
