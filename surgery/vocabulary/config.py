"""Token ids in config.json and generation_config.json, moved to a new vocabulary."""

import re
from collections.abc import Callable, Mapping
from typing import Any

# Keys whose values are ids of tokens, anywhere in a config.
TOKEN_KEY = re.compile(
    r"(^|_)token_(id|ids|index)$|^(begin_)?suppress_tokens$|^bad_words_ids$|^eos_token_ids$"
)
ROLE_KEY = re.compile(r"^(bos|eos|pad|unk|sep|cls|mask|decoder_start)_token_id$")
SIZE_KEY = "vocab_size"

Move = Callable[[int], int | None]


def moved(
    config: Mapping[str, Any], move: Move, lost: list[str], *, own: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return a config with its token ids moved.

    Args:
        move: new id of an old one, or None where there is none.
        lost: takes a sentence for every key whose id has no token any more.
        own: the same config of the model that gives the tokenizer: its roles are taken.
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        theirs = (own or {}).get(key)
        if own is not None and ROLE_KEY.search(key) and theirs is not None:
            found[key] = theirs
        elif TOKEN_KEY.search(key) and value is not None:
            found[key] = _value(key, value, move, lost)
        elif isinstance(value, dict):
            found[key] = moved(value, move, lost, own=theirs if isinstance(theirs, dict) else None)
        else:
            found[key] = value
    return found


def _value(key: str, value: Any, move: Move, lost: list[str]) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, list):
        every = [_value(key, one, move, lost) for one in value]
        return [one for one in every if one is not None]
    if type(value) is not int or value < 0:
        return value
    new = move(value)
    if new is None:
        lost.append(f"{key} {value} has no token in the new vocabulary and is left out")
    return new


def resized(config: Mapping[str, Any], keys: tuple[str, ...], size: int) -> dict[str, Any]:
    """Return a config with the vocabulary's size, in the section `keys` and wherever it stands."""
    found = dict(config)
    if keys:
        found[keys[0]] = resized(config[keys[0]], keys[1:], size)
    if SIZE_KEY in config or not keys:
        found[SIZE_KEY] = size
    return found
