"""Whether checkpoints share one vocabulary, and how they differ where they do not."""

from collections.abc import Sequence

from surgery.checkpoint import Checkpoint
from surgery.vocabulary.read import Vocabulary, read_vocabulary, same_bytes, tokenizer_files
from surgery.vocabulary.tables import table_rows

SHOWN = 3  # differences in a message
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "added_tokens.json")


def explain_difference(checkpoints: Sequence[Checkpoint]) -> str | None:
    """Return one sentence on how the vocabularies differ, or None where they are the same.

    Tokens and ids must agree, and the rows of the embedding. Where files are equal byte for byte
    they are not parsed. Of checkpoints without a tokenizer only the rows are compared.

    Raises:
        CheckpointError: a tokenizer cannot be read.
    """
    first = checkpoints[0]
    for other in checkpoints[1:]:
        found = _difference(first, other)
        if found:
            return found
    return None


def _difference(first: Checkpoint, other: Checkpoint) -> str | None:
    rows = [table_rows(first), table_rows(other)]
    mine, theirs = _files(first), _files(other)
    if not mine or not theirs or same_bytes(mine, theirs):
        return _rows(first, other, rows) if rows[0] != rows[1] else None
    one, two = read_vocabulary(first), read_vocabulary(other)
    if one.ids == two.ids:
        return _rows(first, other, rows) if rows[0] != rows[1] else None
    sizes = f"{_size(one)}, {_size(two)}"
    return f"{sizes}; the first differences: {'; '.join(_first(one, two))}"


def _files(checkpoint: Checkpoint) -> list:  # type: ignore[type-arg]
    return [path for path in tokenizer_files(checkpoint) if path.name in FILES]


def _rows(first: Checkpoint, other: Checkpoint, rows: Sequence[int]) -> str:
    return f"{first.ref} has {rows[0]} rows for its tokens, {other.ref} has {rows[1]}"


def _size(vocabulary: Vocabulary) -> str:
    return f"{vocabulary.ref} has {len(vocabulary.ids)} tokens in {vocabulary.rows} rows"


def _first(one: Vocabulary, two: Vocabulary) -> list[str]:
    """Return the first differences, by id."""
    names = [{number: token for token, number in v.ids.items()} for v in (one, two)]
    ids = sorted(names[0].keys() | names[1].keys())
    differing = [n for n in ids if names[0].get(n) != names[1].get(n)]
    shown = [f"{n} is {_token(names[0], n)} and {_token(names[1], n)}" for n in differing[:SHOWN]]
    return [*shown, f"{len(differing)} ids differ in all"]


def _token(names: dict[int, str], number: int) -> str:
    return repr(names[number][:40]) if number in names else "nothing"
