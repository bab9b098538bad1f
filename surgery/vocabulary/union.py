"""One tokenizer.json with the tokens of several: the donor's ids stay, new ones follow."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

from surgery.errors import CheckpointError, RecipeError
from surgery.vocabulary.read import FLAGS, REMEDY, Vocabulary, compact

# Parts of a model that decide which strings its merges make: they must agree.
SPELLING = ("type", "continuing_subword_prefix", "end_of_word_suffix", "max_input_chars_per_word")
# Parts of which the donor's are taken.
MANNER = ("unk_token", "fuse_unk", "byte_fallback", "ignore_merges", "dropout")
STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
PLACE = "tokenizer.source"


@dataclass(frozen=True, slots=True, kw_only=True)
class Union:
    """A new vocabulary and the files that hold it.

    Attributes:
        ids: token to id.
        files: name to bytes.
        obsolete: names of the donor's files that would contradict them.
        notes: what the user should know.
    """

    ids: Mapping[str, int]
    files: Mapping[str, bytes]
    obsolete: tuple[str, ...]
    notes: tuple[str, ...]


def unite(
    donor: Vocabulary, others: Sequence[Vocabulary], more: Mapping[str, Mapping[str, Any]]
) -> Union:
    """Add the tokens of other models, and single further ones, to the donor's tokenizer.

    New tokens follow the donor's last id: model after model, each in the order of its ids, then
    `more`, which are added tokens with their flags. Rows that pad the donor's table are named
    first. Merges follow the donor's likewise.

    Raises:
        RecipeError: a tokenizer has no tokenizer.json, or the tokenizers are of kinds that do
            not fit together.
    """
    for model in (donor, *others):
        _check_fits(donor, model)
    ids = dict(donor.ids)
    for model in others:
        _append(ids, sorted(model.ids, key=model.ids.__getitem__))
    _append(ids, more)
    document = _document(donor, others, ids, more)
    files = {"tokenizer.json": compact(document)}
    if isinstance(donor.settings.get("added_tokens_decoder"), dict):
        files["tokenizer_config.json"] = compact(_settings(donor, document["added_tokens"]))
    stale = ("vocab.json", "merges.txt", "vocab.txt", "added_tokens.json", "tokenizer.model")
    obsolete = tuple(path.name for path in donor.files if path.name in stale)
    return Union(ids=ids, files=files, obsolete=obsolete, notes=tuple(_notes(donor, others)))


def _append(ids: dict[str, int], tokens: Iterable[str]) -> None:
    fresh = [token for token in tokens if token not in ids]
    first = max(ids.values(), default=-1) + 1
    ids.update(zip(fresh, range(first, first + len(fresh)), strict=True))


def _check_fits(donor: Vocabulary, model: Vocabulary) -> None:
    if model.document is None:
        fact = f"{model.ref} has a {model.kind} tokenizer without a tokenizer.json"
        raise RecipeError(PLACE, f"{fact}, which nothing can be added to", REMEDY)
    one, two = _model(donor), _model(model)
    differing = next(
        (key for key in SPELLING if (one.get(key) or "") != (two.get(key) or "")), None
    )
    remedy = "take one model's tokenizer: source: base, or a model's name"
    if donor.kind != model.kind or differing is not None:
        what = f"{donor.kind} in {donor.ref} and {model.kind} in {model.ref}"
        if donor.kind == model.kind:
            what = f"of another {differing} in {donor.ref} than in {model.ref}"
        raise RecipeError(PLACE, f"the tokenizers are {what}, which have no union", remedy)
    if donor.alphabet != model.alphabet:
        fact = f"{donor.ref} spells its tokens as {donor.alphabet}, {model.ref} as {model.alphabet}"
        raise RecipeError(PLACE, f"{fact}, which have no union", remedy)
    if donor.kind == "Unigram" and one["vocab"] != two["vocab"]:
        fact = f"{donor.ref} and {model.ref} give their pieces scores that cannot be compared"
        raise RecipeError(PLACE, f"{fact}, so they have no union", remedy)


def _model(vocabulary: Vocabulary) -> Mapping[str, Any]:
    found: Mapping[str, Any] = (vocabulary.document or {})["model"]
    return found


def _document(
    donor: Vocabulary,
    others: Sequence[Vocabulary],
    ids: Mapping[str, int],
    more: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    old = dict(donor.document or {})
    model = dict(_model(donor))
    flags = {**_added_tokens(donor, others), **more}
    added = [
        {
            "id": ids[token],
            "content": token,
            **{flag: flags[token].get(flag, False) for flag in FLAGS},
        }
        for token in sorted(flags, key=ids.__getitem__)
    ]
    if donor.kind != "Unigram":
        # Added tokens go into the model's vocabulary too: tokenizers gives those that are not
        # in it the ids that follow it, whatever the file says.
        model["vocab"] = dict(ids)
    if donor.kind == "BPE":
        model["merges"] = _merges([donor, *others])
    return {**old, "added_tokens": added, "model": model}


def _merges(models: Sequence[Vocabulary]) -> list[Any]:
    """Return the donor's merges, then the others' that are not among them, in their order."""
    lists = [_checked(model) for model in models]
    if all(isinstance(merge, str) for merges in lists for merge in merges[:1]):
        return list(dict.fromkeys(chain.from_iterable(lists)))
    return list(dict.fromkeys(chain.from_iterable(map(_pairs, lists))))


def _checked(model: Vocabulary) -> list[Any]:
    merges = _model(model).get("merges") or []
    kinds = set(map(type, merges)) if isinstance(merges, list) else {None}
    if not (kinds <= {str} or kinds <= {list}):
        raise CheckpointError(model.ref, "its tokenizer.json has broken merges", "restore it")
    return merges


def _pairs(merges: Sequence[Any]) -> Iterable[tuple[str, ...]]:
    if merges and isinstance(merges[0], str):
        return (tuple(merge.split(" ", 1)) for merge in merges)
    return map(tuple, map(map, repeat(str), merges))


def _added_tokens(donor: Vocabulary, others: Sequence[Vocabulary]) -> dict[str, Mapping[str, Any]]:
    """Return added tokens with the flags of the first model that has them.

    An ordinary token of the donor becomes an added one only where another model holds it special.
    """
    flags = dict(donor.added)
    known: set[str] = set(donor.ids)
    for model in others:
        for token, told in model.added.items():
            if token not in known or told["special"]:
                flags.setdefault(token, told)
        known |= model.ids.keys()
    return flags


def _settings(donor: Vocabulary, added: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    decoder = {str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in added}
    return {**donor.settings, "added_tokens_decoder": decoder}


def _notes(donor: Vocabulary, others: Sequence[Vocabulary]) -> Iterable[str]:
    for model in others:
        steps = [k for k in STEPS if (donor.document or {}).get(k) != (model.document or {}).get(k)]
        steps += [k for k in MANNER if _model(donor).get(k) != _model(model).get(k)]
        if steps:
            yield (
                f"{model.ref} has another {', '.join(steps)} in its tokenizer than {donor.ref}, "
                "whose is kept: it may see text cut in a way that it was not trained on"
            )
