"""Recipes from Python or flags instead of YAML."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.errors import RecipeError
from surgery.method import Parameter, find_method
from surgery.recipe.parse import parse_recipe
from surgery.recipe.reader import Document
from surgery.recipe.schema import Recipe


def merge_models(
    method: str,
    models: Sequence[str | Path],
    *,
    base: str | Path | None = None,
    out_dtype: str | None = None,
    seed: int = 0,
    tokenizer: str | Mapping[str, Any] | None = None,
    chat_template: str | None = None,
    match_experts: bool = False,
    flags: Mapping[str, str] | None = None,
    **parameters: Any,  # noqa: ANN401 - the method's own
) -> Recipe:
    """Return the recipe that merges whole models.

    Args:
        models: paths or hub names; the base need not be among them.
        match_experts: put experts where the base (or first model) has like ones, before merging.
        parameters: by the names that users write, `lambda_` for lambda. A number is for all
            models; a list gives one value per model where the parameter has one per model, and
            is a gradient over depth where it does not. `{"value": [...]}` is a gradient for all,
            `[{"filter": ..., "value": ...}, ...]` chooses by tensor name.
        flags: how the user wrote each parameter, for messages.

    Raises:
        RecipeError: no such method or parameter, or another number of values than models.
    """
    found = find_method(method)
    table: dict[str, Any] = {"merge_method": method, "models": [{"model": str(m)} for m in models]}
    optional = {
        "base_model": None if base is None else str(base),
        "out_dtype": out_dtype,
        "tokenizer": tokenizer,
        "chat_template": chat_template,
        "match_experts": match_experts or None,
        "seed": seed or None,
    }
    table |= {key: value for key, value in optional.items() if value is not None}
    places = {"models": "the models", **(flags or {})}
    for name, value in parameters.items():
        known = found.parameter(name.rstrip("_"), method)
        _place(table, places, known, value, (flags or {}).get(known.name, known.name))
    return parse_recipe(Document(value=table, flags=places))


def _place(
    table: dict[str, Any],
    places: dict[str, str],
    parameter: Parameter,
    value: object,
    flag: str,
) -> None:
    value = list(value) if isinstance(value, tuple) else value
    if not parameter.per_model or not isinstance(value, list) or _is_conditional(value):
        table.setdefault("parameters", {})[parameter.name] = value
        places[f"parameters.{parameter.name}"] = flag
        return
    if len(value) != len(table["models"]):
        fact = f"has {len(value)} values for {len(table['models'])} models"
        raise RecipeError(flag, fact, "give one for all, or one for each model beside the base")
    for n, one in enumerate(value):
        table["models"][n].setdefault("parameters", {})[parameter.name] = one
        places[f"models[{n}].parameters.{parameter.name}"] = flag


def _is_conditional(value: list[Any]) -> bool:
    return bool(value) and isinstance(value[0], dict)
