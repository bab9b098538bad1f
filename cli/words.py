"""A step's values as words of a command line, the names of other steps as their outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from cli.writing import resolved
from surgery.errors import RecipeError
from surgery.recipe.reader import Document

MANAGED = ("output", "dry-run", "json", "force")  # a pipeline has them for all of its steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step as it is written.

    Attributes:
        words: of the command, such as ("merge", "ties").
        command: typer's own object.
        given: per option as written its value.
        writes: it makes a checkpoint; else it measures.
        uses: the steps whose outputs stand among the values.
    """

    name: str
    words: tuple[str, ...]
    command: Any
    given: Mapping[str, Any]
    writes: bool
    keep: bool
    uses: tuple[str, ...]
    document: Document

    def place(self, *path: str) -> str:
        """Tell where something of the step is written."""
        return self.document.place("steps", self.name, *path)


def flag_of(parameter: Any) -> str:  # noqa: ANN401 - typer's own
    """Return the long name of an option, or the name of an argument."""
    return next((o for o in parameter.opts if o.startswith("--")), str(parameter.opts[0]))


def is_argument(parameter: Any) -> bool:  # noqa: ANN401
    """Whether a parameter of typer's is told by its place."""
    return not parameter.opts[0].startswith("-")


def choices_of(command: Any) -> set[str]:  # noqa: ANN401
    """Return the names of a command's parameters that take fixed words: none names a step."""
    asked = signature(command.callback).parameters.items()
    return {name for name, one in asked if _is_choice(one.annotation)}


def _is_choice(kind: Any) -> bool:  # noqa: ANN401 - any annotation
    if get_origin(kind) is Literal or (isinstance(kind, type) and issubclass(kind, Enum)):
        return True
    inside = get_args(kind)[:1] if get_origin(kind) is Annotated else get_args(kind)
    return any(_is_choice(one) for one in inside)


def keys_of(command: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return typer's parameters of a command by the key that they have in the file."""
    found = {
        flag.removeprefix("--"): p
        for p in command.params
        for flag in (flag_of(p), *(o for o in p.opts if o.startswith("--")))
    }
    return {key: p for key, p in found.items() if key not in ("help", "version", *MANAGED)}


def naming(command: Any, given: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ANN401
    """Return those of the given values that may name steps: no choices."""
    keys, choices = keys_of(command), choices_of(command)
    fixed = {key for key, parameter in keys.items() if parameter.name in choices}
    return {name: value for name, value in given.items() if name.replace("_", "-") not in fixed}


def command_line(step: Step, paths: Mapping[str, Path]) -> list[str]:
    """Return the words behind the command, each used step's name replaced by its output."""
    keys, choices = keys_of(step.command), choices_of(step.command)
    options: list[str] = []
    arguments: dict[str, list[str]] = {}
    for name, value in step.given.items():
        parameter = keys[name.replace("_", "-")]
        places = {} if parameter.name in choices else paths
        if is_argument(parameter):
            arguments[parameter.name] = _argument(step, name, parameter, value, places)
        else:
            options += _option(step, name, parameter, value, places)
    ordered = [arguments.get(p.name, []) for p in step.command.params if is_argument(p)]
    return [*options, "--", *(word for words in ordered for word in words)]


def _argument(
    step: Step,
    name: str,
    parameter: Any,  # noqa: ANN401
    value: object,
    paths: Mapping[str, Path],
) -> list[str]:
    words = _words(step, name, value)
    if parameter.nargs == 1 and len(words) != 1:
        raise RecipeError(step.place(name), f"takes one value, not {len(words)}")
    return [resolved(word, paths) for word in words]


def _option(
    step: Step,
    name: str,
    parameter: Any,  # noqa: ANN401
    value: object,
    paths: Mapping[str, Path],
) -> list[str]:
    flag = flag_of(parameter)
    if parameter.is_flag:
        if not isinstance(value, bool):
            raise RecipeError(step.place(name), f"{value!r} is neither true nor false")
        off = parameter.secondary_opts
        return [flag] if value else off[:1]
    words = [resolved(word, paths) for word in _words(step, name, value)]
    several = parameter.multiple and not _are_numbers(value)
    # A list of numbers is one value, written with commas: layers, or a number for each model.
    return [f"{flag}={word}" for word in (words if several else [",".join(words)])]


def _are_numbers(value: object) -> bool:
    items = value if isinstance(value, list) else [value]
    return all(isinstance(item, int | float) for item in items)


def _words(step: Step, name: str, value: object) -> list[str]:
    items = value if isinstance(value, list) else [value]
    if not items or not all(isinstance(item, str | int | float) for item in items):
        fact = "has no value" if value in (None, []) else "is neither a value nor a list of values"
        raise RecipeError(step.place(name), fact, "write it as the command line takes it")
    return [str(item).lower() if isinstance(item, bool) else str(item) for item in items]


def texts(value: object) -> list[str]:
    """Return the words of a value."""
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, str)]


def named(value: object, names: Sequence[str]) -> set[str]:
    """Return the steps that a value names."""
    found: set[str] = set()
    stand_ins = {name: Path(f"/{n}/") for n, name in enumerate(names)}
    for text in texts(value):
        found |= {n for n in names if resolved(text, {n: stand_ins[n]}) != text}
    return found
