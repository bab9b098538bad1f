"""Bring the models of a recipe to one vocabulary before anything else is decided."""

from typing import TYPE_CHECKING, Any

from surgery.errors import RecipeError
from surgery.recipe.inputs import Model
from surgery.recipe.schema import Recipe, TokenSource

if TYPE_CHECKING:
    from surgery.vocabulary import Unified


def unified(recipe: Recipe, models: dict[str, Model]) -> "Unified | None":
    """Return the models in one vocabulary; None where nothing tells that they have one.

    Raises:
        RecipeError: the vocabularies differ and the recipe does not say what to do.
    """
    from surgery.vocabulary import unify  # brings numpy, which help does without

    choice = recipe.tokenizer
    asked = choice is not None or recipe.chat_template is not None
    known = all(m.parts is not None and m.parts.embedding for m in models.values())
    if not asked and not known:
        return None
    refs = list(models)
    try:
        return unify(
            [model.checkpoint for model in models.values()],
            choice=choice.source if choice else None,
            base=refs.index(recipe.base) if recipe.base else None,
            donor=refs.index(recipe.donor),
            names=refs,
            tokens={t: _table(s) for t, s in choice.tokens.items()} if choice else None,
            pad_to_multiple_of=choice.pad_to_multiple_of if choice else None,
            chat_template=recipe.chat_template,
        )
    except RecipeError as error:
        key = error.place.partition(".")[0]
        keys = (key, "models", "slices", "modules")
        place = recipe.document.place(next(k for k in keys if k in recipe.as_written))
        rest = error.place.partition(".")[2]
        raise RecipeError(f"{place}.{rest}" if rest else place, error.fact, error.remedy) from error


def _table(source: TokenSource) -> dict[str, Any]:
    """Write a token's source as a recipe has it."""
    if source.kind is None:
        return {"force": source.force}
    if source.kind == "model":
        return {"source": source.model, "force": source.force}
    inner = {"kind": source.kind, "model": source.model, "token": source.token}
    inner["token_id"] = source.token_id  # type: ignore[assignment]
    kept = {key: value for key, value in inner.items() if value is not None}
    return {"source": kept, "force": source.force}
