"""Parameters of a merge as they are typed: `0.5`, `0.3,0.7`, `[0,0.5,1]`, `mlp=0.5`."""

from collections.abc import Sequence
from typing import Any

from surgery.errors import RecipeError
from surgery.method import Parameter


def parse_flag(given: bool | Sequence[str], parameter: Parameter, option: str) -> Any:  # noqa: ANN401
    """Return what `merge_models` takes for a parameter that was given once or several times.

    Raises:
        RecipeError: unbalanced brackets, two values for the same tensors, or several values
            where the parameter has one for all models.
    """
    if isinstance(given, bool):
        return given
    conditional = [_split_filter(text) for text in given]
    plain = [text for name, text in conditional if name is None]
    if len(plain) > 1:
        fact = "is given twice without a name"
        raise RecipeError(option, fact, "give one, with commas for several models")
    ordered = [item for item in conditional if item[0] is not None]
    ordered += [(None, text) for text in plain]
    columns = [_per_model(text, parameter, option) for _, text in ordered]
    count = max(len(column) for column in columns)
    if any(len(column) not in (1, count) for column in columns):
        raise RecipeError(option, "names another number of models each time", f"give {count}")
    each = [[column[n % len(column)] for column in columns] for n in range(count)]
    names = [name for name, _ in ordered]
    values = [_joined(names, row) for row in each]
    if count > 1:
        return values
    return {"value": values[0]} if names == [None] and isinstance(values[0], list) else values[0]


def _split_filter(text: str) -> tuple[Any, str]:
    name, equals, value = text.rpartition("=")
    if not equals:
        return None, text
    kind, colon, pattern = name.partition(":")
    return ({kind: pattern} if colon and kind in ("glob", "regex") else name), value


def _per_model(text: str, parameter: Parameter, option: str) -> list[Any]:
    """Split at commas outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    if depth:
        raise RecipeError(f"{option} {text}", "has an open bracket", "write for instance [0,0.5,1]")
    if len(parts) > 1 and not parameter.per_model:
        fact = "has one value for all models"
        raise RecipeError(f"{option} {text}", fact, f"for a gradient over depth write [{text}]")
    return [_value(part.strip(), option) for part in parts]


def _value(text: str, option: str) -> Any:  # noqa: ANN401 - text, or a list of it
    if not text.strip("[]"):
        raise RecipeError(option, "has an empty value", "write a number")
    if text.startswith("[") and text.endswith("]"):
        return [part.strip() for part in text[1:-1].split(",")]
    return text


def _joined(names: Sequence[Any], row: Sequence[Any]) -> Any:  # noqa: ANN401
    if list(names) == [None]:
        return row[0]
    entries = [{"filter": name, "value": value} for name, value in zip(names, row, strict=True)]
    return [e if e["filter"] is not None else {"value": e["value"]} for e in entries]
