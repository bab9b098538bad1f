"""The steps of a pipeline file: commands, with the options that their command lines have."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Any

from cli.main import COMMANDS, ClickException, get_command
from cli.words import MANAGED, Step, command_line, flag_of, keys_of, named, naming, texts
from cli.writing import plans_taken_by
from surgery.errors import RecipeError
from surgery.pipeline import Planned, Task, is_ahead
from surgery.recipe import parse_recipe
from surgery.recipe.reader import Document, read_documents

OWN = ("command", "keep")
REFUSED = ("demo",)


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
    options = {flag_of(p) for p in command.params}
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
        uses=_uses(document, name, words, naming(command, given), names),
        document=document,
    )


def _uses(
    document: Document,
    name: str,
    words: Sequence[str],
    given: Mapping[str, Any],
    names: Sequence[str],
) -> tuple[str, ...]:
    """Return the steps that stand among the values, or in the recipe that is named."""
    found = set().union(*(named(item, names) for item in given.values()))
    if words == ("run",) and isinstance(given.get("file"), str):
        models = _recipe_models(Path(given["file"]), document.place("steps", name, "file"))
        found |= named(models, names)
        for model in models:
            _refuse_path(model, names, document.place("steps", name, "file"))
    return tuple(other for other in names if other in found)


def _recipe_models(file: Path, place: str) -> list[str]:
    documents = read_documents(file)
    if any("steps" in one.value for one in documents):
        raise RecipeError(place, f"{file} is a pipeline, which is no step of another", "copy it in")
    return [model for one in documents for model in parse_recipe(one).models]


def _refuse_path(word: str, names: Sequence[str], place: str) -> None:
    if word in names and Path(word).exists():
        fact = f"{word!r} is both a step and a path"
        raise RecipeError(place, fact, f"write ./{word} for the path, or rename the step")


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


def _check_value_names(step: Step) -> None:
    keys, free = keys_of(step.command), naming(step.command, step.given)
    for name, value in step.given.items():
        place, key = step.place(name), name.replace("_", "-")
        if key in MANAGED:
            raise RecipeError(place, f"{name} is the pipeline's own", "give it to `surgery run`")
        if key not in keys:
            _unknown(place, f"{' '.join(step.words)} has no option", key, keys)
        for word in texts(value) if name in free else ():
            _refuse_path(word, step.uses, place)


def _unknown(place: str, fact: str, word: str, known: Sequence[str] | Mapping[str, Any]) -> None:
    close = get_close_matches(word, list(known), n=1)
    remedy = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
    told = f"{word!r} {fact}" if fact.startswith("is") else f"{fact} {word!r}"
    raise RecipeError(place, told, remedy)


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


def as_task(step: Step, defaults: Sequence[str], folder: Path) -> Task:
    """Return what a step asks of the pipeline.

    Args:
        defaults: options that hold for all steps that write, before their own.
        folder: where outputs go, and what steps keep beside them.
    """
    out = ["--output", str(folder / step.name)]
    writes = step.writes
    asked = command_line(step, {})
    return Task(
        name=step.name,
        what=" ".join(step.words),
        uses=step.uses,
        keep=step.keep,
        plan=(lambda paths: _plan(step, [*defaults, *out], paths)) if writes else None,
        measure=None if writes else (lambda paths: _measure(step, paths)),
        asked=tuple(asked),
    )


def _plan(step: Step, defaults: Sequence[str], paths: Mapping[str, Path]) -> Planned:
    """Call a command for its plan."""
    taken: list[Planned] = []
    words = [*defaults, *command_line(step, paths)]
    taker = plans_taken_by(
        lambda plan, limits, in_all: taken.append(Planned(plan=plan, limits=limits, in_all=in_all)),
        outputs=paths,
    )
    with taker, _told_aside():
        _call(step, words)
    if len(taken) != 1:
        fact = f"{' '.join(step.words)} makes {len(taken) or 'no'} checkpoints with these options"
        raise RecipeError(step.place(), fact, "a step makes one")
    return taken[0]


@contextmanager
def _told_aside() -> Iterator[None]:
    """Print what a command tells beside its plan on stderr, and nothing of a look ahead."""
    if not is_ahead():
        with redirect_stdout(sys.stderr):
            yield
        return
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield


def _measure(step: Step, paths: Mapping[str, Path]) -> str:
    told = StringIO()
    with redirect_stdout(told):
        _call(step, ["--json", *command_line(step, paths)])
    return told.getvalue()


def _call(step: Step, words: Sequence[str]) -> None:
    context = _parse(step, words)
    with context, _usage_errors(step):
        step.command.invoke(context)
