"""A recipe in a record: inputs by name and order instead of by path."""

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.errors import RecipeError
from surgery.recipe.fields import model_ref
from surgery.recipe.reader import Document
from surgery.recipe.schema import Recipe
from surgery.recipe.settings import Places

REFERENCES = ("model", "base_model", "donor", "tokenizer_source", "tokenizer", "source")


def recorded(recipe: Recipe, sources: Sequence[Checkpoint]) -> dict[str, Any]:
    """Return what `reproduce` repeats: the recipe with names for its inputs, in their order."""
    names = _names(sources)
    table = dict(zip(recipe.models, names, strict=True))
    written = {key: _renamed(key, value, table) for key, value in recipe.as_written.items()}
    return {"recipe": written, "models": names}


def _names(sources: Sequence[Checkpoint]) -> list[str]:
    """Name inputs by their last part, and number those that share one."""
    names: list[str] = []
    for source in sources:
        name, count = source.name, 2
        while name in names:
            name, count = f"{source.name}-{count}", count + 1
        names.append(name)
    return names


def _renamed(key: str, value: Any, names: Mapping[str, str]) -> Any:  # noqa: ANN401 - plain values
    """Return a part of a recipe with every reference to a model replaced."""
    if key == "parameters":
        return value
    if key in REFERENCES and (ref := _reference(value)) in names:
        return names[ref]
    if isinstance(value, dict):
        return {k: _renamed(k, v, names) for k, v in value.items()}
    if isinstance(value, list):
        below = "model" if key == "models" else ""
        return [_renamed(below if isinstance(v, str) else "", v, names) for v in value]
    return value


def _reference(value: object) -> str:
    try:
        return model_ref(value, Places(Document(value={})))
    except RecipeError:  # a table of another kind
        return ""
