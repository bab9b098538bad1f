"""What a recipe says of single tokens: `tokens: {"<tok>": {source: ..., force: ...}}`."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from difflib import get_close_matches

from surgery.errors import RecipeError
from surgery.vocabulary.read import Vocabulary
from surgery.vocabulary.rows import ZERO, RowMap

KEYS = {"source", "force"}
KINDS = {
    "model": {"kind", "model"},
    "model_token": {"kind", "model", "token", "token_id"},
    "zero": {"kind"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """Where the row of one token comes from.

    Attributes:
        model, row: the place of a model and a row of it; ZERO and -1 for a row of zeros.
        force: also where a model has the token itself.
    """

    token: str
    model: int
    row: int
    force: bool = False


def read_instructions(
    tokens: Mapping[str, object], models: Sequence[Vocabulary], names: Sequence[str]
) -> list[Instruction]:
    """Check and resolve the `tokens` table of a recipe.

    Args:
        names: how the recipe calls each model.

    Raises:
        RecipeError: a key, kind, model, token or id that there is not.
    """
    return [_instruction(token, told, models, names) for token, told in tokens.items()]


def _instruction(
    token: str, told: object, models: Sequence[Vocabulary], names: Sequence[str]
) -> Instruction:
    place = f"tokenizer.tokens.{token}"
    table = _table(place, told, KEYS)
    force = table.get("force", False)
    if not isinstance(force, bool):
        raise RecipeError(f"{place}.force", f"is {force!r}", "write true or false")
    if table.get("source") is None:
        raise RecipeError(place, "has no source", "say where the row comes from")
    model, row = _source(f"{place}.source", token, table["source"], models, names)
    return Instruction(token=token, model=model, row=row, force=force)


def _table(place: str, told: object, keys: set[str]) -> Mapping[str, object]:
    if not isinstance(told, Mapping):
        raise RecipeError(place, f"is {told!r}", f"write a table of {', '.join(sorted(keys))}")
    unknown = next((key for key in told if key not in keys), None)
    if unknown is not None:
        close = get_close_matches(str(unknown), keys, 1)
        remedy = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(sorted(keys))}"
        raise RecipeError(place, f"has no key {unknown!r}", remedy)
    return told


def _source(
    place: str, token: str, told: object, models: Sequence[Vocabulary], names: Sequence[str]
) -> tuple[int, int]:
    if isinstance(told, str):
        told = {"kind": "model", "model": told}
    kind = told.get("kind") if isinstance(told, Mapping) else None
    if kind not in KINDS:
        fact = f"is {told!r}" if kind is None else f"has the kind {kind!r}"
        raise RecipeError(place, fact, f"name a model, or a kind: {', '.join(KINDS)}")
    table = _table(place, told, KINDS[str(kind)])
    if kind == "zero":
        return ZERO, -1
    model = find_model(f"{place}.model", table.get("model"), names)
    return model, _row(place, token, table, models[model])


def find_model(place: str, told: object, names: Sequence[str]) -> int:
    """Return the place of the model that a recipe calls `told`.

    Raises:
        RecipeError: there is none.
    """
    if isinstance(told, Mapping):  # the peer writes {model: {path: ...}} when it saves a recipe
        inner = told.get("model", told)
        told = inner.get("path") if isinstance(inner, Mapping) else inner
    if told in names:
        return list(names).index(str(told))
    close = get_close_matches(str(told), names, 1)
    remedy = f"did you mean {close[0]}?" if close else f"the models are {', '.join(names)}"
    raise RecipeError(place, f"{told!r} is no model of this merge", remedy)


def _row(place: str, token: str, table: Mapping[str, object], model: Vocabulary) -> int:
    named, number = table.get("token"), table.get("token_id")
    if table["kind"] == "model_token" and (named is None) == (number is None):
        raise RecipeError(place, "needs either token or token_id", "write one of them")
    if number is None:
        wanted = token if named is None else named
        number = model.ids.get(str(wanted))
        if number is None:
            raise RecipeError(place, f"{model.ref} has no token {wanted!r}", "name another model")
    if type(number) is not int or not 0 <= number < model.rows:
        fact = f"{model.ref} has no row {number!r}; it has {model.rows}"
        raise RecipeError(place, fact, "name another token")
    return number


def follow(
    instructions: Sequence[Instruction], maps: Sequence[RowMap], ids: Mapping[str, int]
) -> None:
    """Write what was asked for into freshly made maps."""
    for told in instructions:
        at = ids[told.token]
        for row_map in maps:
            if told.force or row_map.own[row_map.number, at] < 0:
                row_map.pick[at], row_map.row[at] = told.model, told.row


def foreign(instructions: Sequence[Instruction], ids: Set[str]) -> list[str]:
    """Return the tokens that are asked for and not in a vocabulary yet."""
    return [told.token for told in instructions if told.token not in ids]


def counted(maps: Sequence[RowMap]) -> list[dict[str, int]]:
    """Return how many rows of each model come from where, for the record."""
    return [{k: n for k, n in row_map.counts().items() if n} for row_map in maps]
