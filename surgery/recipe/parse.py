"""Turn a document into a recipe: every key known, every value of its kind."""

from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from surgery.checkpoint.header import quoted
from surgery.errors import RecipeError
from surgery.recipe.fields import check_keys, check_table, model_ref
from surgery.recipe.reader import Document, read_documents
from surgery.recipe.schema import DTYPES, Module, Recipe, Slice, Source
from surgery.recipe.settings import Places, parse_settings
from surgery.recipe.tokens import parse_tokenizer

TOP = (
    *("merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype"),
    *("out_dtype", "tokenizer", "tokenizer_source", "chat_template", "seed", "name", "donor"),
    "match_experts",
)
LARGEST_SEED = 2**63


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe of one document; see `load_recipes` for files of several.

    Raises:
        RecipeError: it cannot be read, or asks for something that makes no sense.
    """
    found = load_recipes(path)
    if len(found) != 1:
        fact = f"holds {len(found)} recipes"
        raise RecipeError(path, fact, "run it with `surgery run`, or keep one")
    return found[0]


def load_recipes(path: str | Path) -> tuple[Recipe, ...]:
    """Read a recipe file, ours or the peer's, of one or more documents."""
    return tuple(parse_recipe(document) for document in read_documents(Path(path)))


def parse_recipe(document: Document | Mapping[str, Any]) -> Recipe:
    """Turn a document, or a plain table of the same keys, into a recipe.

    Raises:
        RecipeError: an unknown key, a value of another kind, or a form that is neither ours
            nor the peer's.
    """
    if not isinstance(document, Document):
        document = Document(value=dict(document))
    place = Places(document)
    table = document.value
    check_keys(table, TOP, place)
    method = table.get("merge_method")
    if not isinstance(method, str):
        fact = "has no merge_method" if method is None else "merge_method is no word"
        raise RecipeError(place(), fact, "write for instance merge_method: linear")
    notes: list[str] = []
    return Recipe(
        method=method,
        modules=_modules(table, place, notes),
        document=document,
        base=_optional_model(table, "base_model", place),
        donor_model=_optional_model(table, "donor", place),
        settings=parse_settings(table.get("parameters"), place.below("parameters")),
        dtype=_dtype(table, "dtype", place),
        out_dtype=_dtype(table, "out_dtype", place),
        tokenizer=parse_tokenizer(table, place),
        chat_template=_text(table, "chat_template", place),
        match_experts=_switch(table, "match_experts", place),
        seed=_seed(table, place),
        name=_text(table, "name", place),
        notes=tuple(notes),
    )


def _modules(table: Mapping[str, Any], place: Places, notes: list[str]) -> tuple[Module, ...]:
    form = _form(table, place, ("models", "slices", "modules"))
    if form != "modules":
        return (_module("default", table, form, place, notes),)
    found = []
    given = table["modules"]
    if not isinstance(given, dict):
        raise RecipeError(place("modules"), "is no table of modules", "name each: text: {models}")
    for name, inner in given.items():
        here = place.below("modules", name)
        check_table(inner, here)
        check_keys(inner, ("models", "slices", "parameters"), here)
        settings = parse_settings(inner.get("parameters"), here.below("parameters"))
        form = _form(inner, here, ("models", "slices"))
        found.append(replace(_module(name, inner, form, here, notes), settings=settings))
    return tuple(found)


def _form(table: Mapping[str, Any], place: Places, forms: tuple[str, ...]) -> str:
    given = [key for key in forms if table.get(key)]
    if len(given) == 1:
        return given[0]
    told = f"has {' and '.join(given)}" if given else f"has none of {', '.join(forms)}"
    raise RecipeError(place(*given[:1]), told, f"give exactly one of {', '.join(forms)}")


def _module(
    name: str, table: Mapping[str, Any], form: str, place: Places, notes: list[str]
) -> Module:
    given = table[form]
    here = place.below(form)
    if not isinstance(given, list):
        raise RecipeError(here(), "is no list", f"write {form}: and a dash before each")
    if form == "models":
        sources = tuple(_source(item, here.below(n), None) for n, item in enumerate(given))
        slices: tuple[Slice, ...] = (Slice(sources=sources, place=here()),)
    else:
        slices = tuple(_slice(item, here.below(n), notes) for n, item in enumerate(given))
    for slice_ in slices:
        _check_twice(slice_)
    return Module(name=name, place=place(), slices=slices, whole=form == "models")


def _slice(item: object, place: Places, notes: list[str]) -> Slice:
    table = check_table(item, place)
    check_keys(table, ("sources", "base_model", "residual_weight", "parameters"), place)
    sources = table.get("sources")
    if not isinstance(sources, list) or not sources:
        remedy = "write sources: [{model: ..., layer_range: [0, 8]}]"
        raise RecipeError(place(), "has no sources", remedy)
    if table.get("residual_weight") is not None:
        notes.append(f"{place('residual_weight')}: is accepted and changes nothing")
    below = place.below("sources")
    return Slice(
        sources=tuple(
            _source(source, below.below(n), "layer_range") for n, source in enumerate(sources)
        ),
        place=place(),
        base=_optional_model(table, "base_model", place),
        settings=parse_settings(table.get("parameters"), place.below("parameters")),
    )


def _source(item: object, place: Places, layers: str | None) -> Source:
    if isinstance(item, str) and layers is None:
        return Source(model=model_ref(item, place), place=place())
    table = check_table(item, place)
    check_keys(table, ("model", "parameters", *((layers,) if layers else ())), place)
    if "model" not in table:
        raise RecipeError(place(), "names no model", "write model: PATH or org/name")
    return Source(
        model=model_ref(table["model"], place.below("model")),
        place=place(),
        layers=_layer_range(table.get(layers), place.below(layers)) if layers else None,
        settings=parse_settings(table.get("parameters"), place.below("parameters")),
    )


def _check_twice(slice_: Slice) -> None:
    seen: set[str] = set()
    for source in slice_.sources:
        if source.model in seen:
            fact = f"names {quoted(source.model)} twice"
            raise RecipeError(source.place, fact, "name it once, with the sum of its weights")
        seen.add(source.model)


def _layer_range(given: object, place: Places) -> tuple[int, int]:
    if not isinstance(given, list) or len(given) != 2 or any(type(n) is not int for n in given):  # noqa: PLR2004
        fact = "is no pair of layer numbers" if given is not None else "is missing"
        raise RecipeError(place(), fact, "write [first, behind the last], such as [0, 16]")
    begin, end = given
    if begin < 0 or end <= begin:
        fact = f"[{begin}, {end}] holds no layers"
        if begin < 0:
            fact = f"[{begin}, {end}] starts below 0"
        remedy = f"did you mean [{end}, {begin}]?" if 0 <= end < begin else "layers count from 0"
        if begin == end:
            remedy = f"the end is not included: [{begin}, {begin + 1}] is layer {begin}"
        raise RecipeError(place(), fact, remedy)
    return begin, end


def _optional_model(table: Mapping[str, Any], key: str, place: Places) -> str | None:
    given = table.get(key)
    return None if given is None else model_ref(given, place.below(key))


def _dtype(table: Mapping[str, Any], key: str, place: Places) -> str | None:
    given = table.get(key)
    if given is None:
        return None
    name = str(given).removeprefix("torch.")
    if name not in DTYPES:
        close = get_close_matches(name, DTYPES, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(DTYPES)}"
        raise RecipeError(place(key), f"{quoted(str(given))} is no dtype for weights", hint)
    return DTYPES[name]


def _switch(table: Mapping[str, Any], key: str, place: Places) -> bool:
    given = table.get(key)
    if given is not None and type(given) is not bool:
        raise RecipeError(place(key), "is neither true nor false", "write true or leave it out")
    return bool(given)


def _text(table: Mapping[str, Any], key: str, place: Places) -> str | None:
    given = table.get(key)
    if given is not None and (not isinstance(given, str) or not given):
        raise RecipeError(place(key), "is no text", "put it in quotes")
    return given


def _seed(table: Mapping[str, Any], place: Places) -> int:
    given = table.get("seed", 0)
    if type(given) is not int or not 0 <= given < LARGEST_SEED:
        raise RecipeError(place("seed"), f"{given!r} is no seed", "give a whole number from 0 on")
    return given
