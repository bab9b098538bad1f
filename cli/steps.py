"""The steps of a pipeline file: commands, with the options that their command lines have."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Any

from cli.main import COMMANDS, ClickException, get_command
from cli.writing import plans_taken_by
from surgery.errors import RecipeError
from surgery.pipeline import Planned, Task
from surgery.recipe.reader import Document

OWN = ("command", "keep")
MANAGED = ("output", "dry-run", "json", "force")  # a pipeline has them for all of its steps
REFUSED = ("demo",)


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


def read_steps(document: Document) -> list[Step]:
    """Return the steps of a pipeline file, every command and option known.

    Raises:
        RecipeError: an unknown command, option or key, or a value of another kind.
    """
    given = document.value["steps"]
    if not isinstance(given, dict) or not given:
        remedy = "write for instance deeper: {command: stack, base: model, factor: 2}"
        raise RecipeError(document.place("steps"), "is no table of named steps", remedy)
    steps = [_read_step(document, name, value, tuple(given)) for name, value in given.items()]
    for step in steps:
        _check_value_names(step)
        _parse(step, command_line(step, {}))
    return steps


def _read_step(document: Document, name: str, value: object, names: Sequence[str]) -> Step:
    place = document.place("steps", name)
    if not name.isprintable() or name.startswith((".", "-")) or {"/", "\\", "=", "+"} & set(name):
        remedy = "its output gets the name: use letters, digits, - and _"
        raise RecipeError(place, f"{name!r} is no name for a step", remedy)
    if not isinstance(value, dict) or not isinstance(value.get("command"), str):
        raise RecipeError(place, "has no command", "write for instance command: stack")
    keep = value.get("keep", True)
    if not isinstance(keep, bool):
        where = document.place("steps", name, "keep")
        raise RecipeError(where, f"{keep!r} is neither true nor false")
    where = document.place("steps", name, "command")
    words, command = _find(value["command"].split(), where)
    options = {_flag(p) for p in command.params}
    given = {key: item for key, item in value.items() if key not in OWN}
    writes = {"--output", "--dry-run"} <= options
    if "--json" not in options or words[0] in REFUSED:
        raise RecipeError(where, f"{' '.join(words)!r} neither writes a checkpoint nor measures")
    if not keep and not writes:
        raise RecipeError(place, "keep: false is for steps that write a checkpoint", "drop it")
    return Step(
        name=name,
        words=words,
        command=command,
        given=given,
        writes=writes,
        keep=keep,
        uses=tuple(n for n in names if any(n in _named(item, names) for item in given.values())),
        document=document,
    )


def _find(words: Sequence[str], place: str) -> tuple[tuple[str, ...], Any]:
    """Return the words of a command, such as `merge ties`, and typer's object of it."""
    command: Any = get_command()
    taken: list[str] = []
    for word in words:
        if not hasattr(command, "list_commands"):
            remedy = "write each argument as a key of its own"
            raise RecipeError(place, f"{' '.join(taken)} has no command {word!r}", remedy)
        if not taken and word not in COMMANDS:
            _unknown(place, "is no command", word, COMMANDS)
        try:
            command = command.get_command(None, word)
        except RecipeError as error:
            raise RecipeError(place, f"{word!r} {error.fact}", error.remedy) from error
        if command is None:
            raise RecipeError(place, f"{' '.join(taken)} has no command {word!r}")
        taken.append(word)
    if hasattr(command, "list_commands"):
        names = ", ".join(command.list_commands(None))
        raise RecipeError(place, f"{' '.join(taken)} needs a further word", f"it has {names}")
    return tuple(taken), command


def _flag(parameter: Any) -> str:  # noqa: ANN401 - typer's own
    """Return the long name of an option, or the name of an argument."""
    return next((o for o in parameter.opts if o.startswith("--")), str(parameter.opts[0]))


def _is_argument(parameter: Any) -> bool:  # noqa: ANN401
    return not parameter.opts[0].startswith("-")


def _keys(step: Step) -> dict[str, Any]:
    """Return typer's parameters by the key that they have in the file."""
    found = {_flag(p).removeprefix("--"): p for p in step.command.params}
    return {key: p for key, p in found.items() if key not in ("help", "version", *MANAGED)}


def _check_value_names(step: Step) -> None:
    keys = _keys(step)
    for name, value in step.given.items():
        place, key = step.place(name), name.replace("_", "-")
        if key in MANAGED:
            raise RecipeError(place, f"{name} is the pipeline's own", "give it to `surgery run`")
        if key not in keys:
            _unknown(place, f"{' '.join(step.words)} has no option", key, keys)
        for word in _texts(value):
            if word in step.uses and Path(word).exists():
                fact = f"{word!r} is both a step and a path"
                raise RecipeError(place, fact, f"write ./{word} for the path, or rename the step")


def _unknown(place: str, fact: str, word: str, known: Sequence[str] | Mapping[str, Any]) -> None:
    close = get_close_matches(word, list(known), n=1)
    remedy = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
    told = f"{word!r} {fact}" if fact.startswith("is") else f"{fact} {word!r}"
    raise RecipeError(place, told, remedy)


def command_line(step: Step, paths: Mapping[str, Path]) -> list[str]:
    """Return the words behind the command, each used step's name replaced by its output."""
    keys = _keys(step)
    options: list[str] = []
    arguments: dict[str, list[str]] = {}
    for name, value in step.given.items():
        parameter = keys[name.replace("_", "-")]
        if _is_argument(parameter):
            arguments[parameter.name] = _argument(step, name, parameter, value, paths)
        else:
            options += _option(step, name, parameter, value, paths)
    ordered = [arguments.get(p.name, []) for p in step.command.params if _is_argument(p)]
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
    return [_resolved(word, paths) for word in words]


def _option(
    step: Step,
    name: str,
    parameter: Any,  # noqa: ANN401
    value: object,
    paths: Mapping[str, Path],
) -> list[str]:
    flag = _flag(parameter)
    if parameter.is_flag:
        if not isinstance(value, bool):
            raise RecipeError(step.place(name), f"{value!r} is neither true nor false")
        off = parameter.secondary_opts
        return [flag] if value else off[:1]
    words = [_resolved(word, paths) for word in _words(step, name, value)]
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


def _texts(value: object) -> list[str]:
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, str)]


def _named(value: object, names: Sequence[str]) -> set[str]:
    """Return the steps that a value names."""
    found: set[str] = set()
    stand_ins = {name: Path(f"/{n}/") for n, name in enumerate(names)}
    for text in _texts(value):
        found |= {n for n in names if _resolved(text, {n: stand_ins[n]}) != text}
    return found


def _resolved(text: str, paths: Mapping[str, Path]) -> str:
    """Replace the name of a step: alone, behind `NAME=`, beside `+`, or before a `/`."""
    if text in paths:
        return str(paths[text])
    left, equals, right = text.partition("=")
    if equals:
        return f"{left}={_resolved(right, paths)}"
    if "+" in text:
        return "+".join(_resolved(part, paths) for part in text.split("+"))
    first, slash, rest = text.partition("/")
    return f"{paths[first]}/{rest}" if slash and first in paths else text


def _parse(step: Step, words: Sequence[str]) -> Any:  # noqa: ANN401 - typer's context
    with _usage_errors(step):
        return step.command.make_context(" ".join(step.words), list(words))


@contextmanager
def _usage_errors(step: Step) -> Iterator[None]:
    try:
        yield
    except ClickException as error:
        told = " ".join(error.format_message().split()).rstrip(".")
        raise RecipeError(step.place(), f"{' '.join(step.words)}: {told}") from error


def as_task(step: Step, defaults: Sequence[str]) -> Task:
    """Return what a step asks of the pipeline.

    Args:
        defaults: options that hold for all steps that write, before their own.
    """
    writes = step.writes
    asked = command_line(step, {})
    return Task(
        name=step.name,
        what=" ".join(step.words),
        uses=step.uses,
        keep=step.keep,
        plan=(lambda paths: _plan(step, defaults, paths)) if writes else None,
        measure=None if writes else (lambda paths: _measure(step, paths)),
        asked=tuple(asked),
    )


def _plan(step: Step, defaults: Sequence[str], paths: Mapping[str, Path]) -> Planned:
    """Call a command for its plan."""
    taken: list[Planned] = []
    words = [*defaults, "--output", f"{step.name}", *command_line(step, paths)]
    taker = plans_taken_by(lambda plan, limits: taken.append(Planned(plan=plan, limits=limits)))
    with taker, redirect_stdout(sys.stderr):  # what a command tells beside its plan
        _call(step, words)
    if len(taken) != 1:
        fact = f"{' '.join(step.words)} makes {len(taken) or 'no'} checkpoints with these options"
        raise RecipeError(step.place(), fact, "a step makes one")
    return taken[0]


def _measure(step: Step, paths: Mapping[str, Path]) -> str:
    told = StringIO()
    with redirect_stdout(told):
        _call(step, ["--json", *command_line(step, paths)])
    return told.getvalue()


def _call(step: Step, words: Sequence[str]) -> None:
    context = _parse(step, words)
    with context, _usage_errors(step):
        step.command.invoke(context)
