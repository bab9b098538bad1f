"""What any table of a recipe is read with: known keys, references to models."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from surgery.checkpoint.header import quoted
from surgery.errors import RecipeError
from surgery.recipe.settings import Places


def check_keys(table: Mapping[str, Any], known: Iterable[str], place: Places) -> None:
    """Refuse a key that is none of the known ones.

    Raises:
        RecipeError: with the key that was probably meant.
    """
    known = tuple(known)
    for key in table:
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
            raise RecipeError(place(key), f"has the unknown key {quoted(str(key))}", hint)


def check_table(item: object, place: Places) -> Mapping[str, Any]:
    """Return a table.

    Raises:
        RecipeError: it is none.
    """
    if not isinstance(item, dict):
        raise RecipeError(place(), "is no table", "write keys and values")
    return item


def model_ref(given: object, place: Places) -> str:
    """Return a model's reference as one text: a path or hub name, `@revision`, `+adapter`.

    Raises:
        RecipeError: neither text nor the peer's table form.
    """
    if isinstance(given, str) and given.strip():
        return given.strip()
    if not isinstance(given, dict):
        raise RecipeError(place(), "names no model", "write a path or org/name")
    check_keys(given, ("model", "lora", "override_architecture"), place)
    if given.get("override_architecture"):
        fact = "is not supported, and not needed: names in the file decide"
        raise RecipeError(place("override_architecture"), fact, "leave it out")
    ref = _path_ref(given.get("model"), place.below("model"))
    lora = given.get("lora")
    return f"{ref}+{_path_ref(lora, place.below('lora'))}" if lora is not None else ref


def _path_ref(given: object, place: Places) -> str:
    if isinstance(given, str) and given:
        return given
    if not isinstance(given, dict) or not isinstance(given.get("path"), str):
        raise RecipeError(place(), "names no path", "write {path: ..., revision: ...}")
    check_keys(given, ("path", "revision"), place)
    revision = given.get("revision")
    return f"{given['path']}@{revision}" if revision else str(given["path"])
