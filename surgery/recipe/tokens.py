"""The part of a recipe that chooses the vocabulary."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from surgery.errors import RecipeError
from surgery.recipe.fields import check_keys, model_ref
from surgery.recipe.schema import TokenizerChoice, TokenSource
from surgery.recipe.settings import Places

WORDS = ("union", "base")


def parse_tokenizer(table: Mapping[str, Any], place: Places) -> TokenizerChoice | None:
    """Read `tokenizer` or the older `tokenizer_source`.

    Raises:
        RecipeError: both are given, or one is of no known form.
    """
    given, source = table.get("tokenizer"), table.get("tokenizer_source")
    if given is not None and source is not None:
        fact = "and tokenizer are both given"
        raise RecipeError(place("tokenizer_source"), fact, "keep tokenizer")
    if source is not None:
        here = place.below("tokenizer_source")
        return TokenizerChoice(source=_source(source, here), place=here())
    if given is None:
        return None
    here = place.below("tokenizer")
    if isinstance(given, str):
        return TokenizerChoice(source=_source(given, here), place=here())
    if not isinstance(given, dict):
        raise RecipeError(here(), "is no table", "write for instance {source: union}")
    check_keys(given, ("source", "tokens", "pad_to_multiple_of"), here)
    return TokenizerChoice(
        source=_source(given.get("source", "union"), here.below("source")),
        place=here(),
        tokens=_tokens(given.get("tokens"), here.below("tokens")),
        pad_to_multiple_of=_multiple(given.get("pad_to_multiple_of"), here),
    )


def _source(given: object, place: Places) -> str:
    """Return `union`, `base` or a model; a word near one of the first two is no model's name."""
    ref = model_ref(given, place)
    close = get_close_matches(ref, WORDS, n=1, cutoff=0.75)
    if ref not in WORDS and close and not Path(ref).expanduser().exists():
        fact = f"{ref!r} is neither union, base nor a model that exists"
        raise RecipeError(place(), fact, f"did you mean {close[0]}?")
    return ref


def _multiple(given: object, place: Places) -> int | None:
    if given is not None and (type(given) is not int or given < 1):
        fact = f"{given!r} is no whole number above 0"
        raise RecipeError(place("pad_to_multiple_of"), fact, "write for instance 64")
    return given


def _tokens(given: object, place: Places) -> dict[str, TokenSource]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise RecipeError(place(), "is no table of tokens", "write TOKEN: {source: MODEL}")
    return {token: _token(entry, place.below(token)) for token, entry in given.items()}


def _token(given: object, place: Places) -> TokenSource:
    if not isinstance(given, dict):
        raise RecipeError(place(), "is no table", "write {source: MODEL}")
    check_keys(given, ("source", "force"), place)
    force = given.get("force", False)
    if not isinstance(force, bool):
        raise RecipeError(place("force"), f"{force!r} is neither true nor false")
    source = given.get("source")
    if source is None:
        return TokenSource(force=force)
    here = place.below("source")
    kind = source.get("kind") if isinstance(source, dict) else None
    if kind == "zero":
        check_keys(source, ("kind",), here)
        return TokenSource(kind="zero", force=force)
    if kind == "model_token":
        return _model_token(source, here, force=force)
    if kind is not None:
        raise RecipeError(here("kind"), f"{kind!r} is no kind", "write model_token or zero")
    return TokenSource(kind="model", model=model_ref(source, here), force=force)


def _model_token(source: Mapping[str, Any], place: Places, *, force: bool) -> TokenSource:
    check_keys(source, ("kind", "model", "token", "token_id"), place)
    token, number = source.get("token"), source.get("token_id")
    if (token is None) == (number is None):
        raise RecipeError(place(), "needs either token or token_id", "give one of them")
    if token is not None and not isinstance(token, str):
        raise RecipeError(place("token"), f"{token!r} is no text", "put it in quotes")
    if number is not None and (type(number) is not int or number < 0):
        raise RecipeError(place("token_id"), f"{number!r} is no token's number")
    model = model_ref(source.get("model"), place.below("model"))
    return TokenSource(kind="model_token", model=model, token=token, token_id=number, force=force)
