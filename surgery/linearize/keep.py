"""Which layers keep softmax attention."""

import re
from collections.abc import Sequence

from surgery.errors import RecipeError

Keep = str | Sequence[int] | None

EVERY, MEASURED = re.compile(r"every:(\d{1,6})"), re.compile(r"kl:(\d{1,6})")
RANGE = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")
EXAMPLES = "for instance every:4, 3,7,11 or 0-3"


def kept_layers(keep: Keep, layers: int) -> tuple[int, ...]:
    """Return the numbers of the layers that keep softmax attention, rising.

    Args:
        keep: `every:N`, the last of every N layers (every:4 is 3, 7, 11, ...); numbers and ranges,
            `3,7,11` or `0-3`; the same as a list; None for no layer.
        layers: how many the model has.

    Raises:
        RecipeError: it cannot be read, names a layer that is not there or one twice, asks for a
            measurement, or leaves no layer to convert.
    """
    found = _numbers(keep, layers)
    place = f"--keep-softmax {_told(keep)}"
    beyond = next((n for n in found if not 0 <= n < layers), None)
    if beyond is not None:
        fact = f"names layer {beyond}, and the last of {layers} layers is {layers - 1}"
        raise RecipeError(place, fact, EXAMPLES)
    if len(set(found)) < len(found):
        twice = next(n for n in found if found.count(n) > 1)
        raise RecipeError(place, f"names layer {twice} twice", "name it once")
    if len(found) == layers:
        raise RecipeError(place, "keeps every layer, which leaves nothing to convert", EXAMPLES)
    return tuple(sorted(found))


def measured_layers(keep: Keep) -> int | None:
    """Return N of `kl:N`; None for what needs no measurement."""
    match = MEASURED.fullmatch(keep.strip()) if isinstance(keep, str) else None
    return int(match[1]) if match else None


def _numbers(keep: Keep, layers: int) -> list[int]:
    if keep is None:
        return []
    if not isinstance(keep, str):
        odd = next((n for n in keep if type(n) is not int), None)
        if odd is not None:
            raise RecipeError(f"--keep-softmax {_told(keep)}", f"{odd!r} is no number", EXAMPLES)
        return list(keep)
    place, text = f"--keep-softmax {keep}", keep.strip()
    if measured_layers(text) is not None:
        fact = "is measured on a model after the transfer stage, and there is none yet"
        raise RecipeError(place, fact, "run it with --stage transfer, or list the layers")
    every = EVERY.fullmatch(text)
    if every:
        return list(_every(place, int(every[1]), layers))
    found: list[int] = []
    for part in text.split(","):
        match = RANGE.fullmatch(part.strip())
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise RecipeError(place, f"{part!r} is no layer and no range of layers", EXAMPLES)
        last = int(match[2] or match[1])
        first = int(match[1])
        found += range(first, max(first, min(last, layers)) + 1)
    return found


def _every(place: str, n: int, layers: int) -> range:
    if not 0 < n <= layers:
        fact = f"keeps no layer of {layers}" if n else "is no distance between layers"
        raise RecipeError(place, fact, EXAMPLES)
    return range(n - 1, layers, n)


def _told(keep: Keep) -> str:
    return keep if isinstance(keep, str) else ",".join(str(n) for n in keep or ())
