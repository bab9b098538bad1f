"""Widths: new sizes as they are asked for, and beside the old ones."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from growth.dimensions import Dimension
from surgery.errors import RecipeError

NAMES: Mapping[str, Dimension] = {
    "hidden": "hidden",
    "ffn": "ffn",
    "heads": "query",
    "kv-heads": "key",
}
SIZE = re.compile(r"([a-z-]+)=([1-9][0-9]{0,6})")
EXAMPLE = "write for instance ffn=4096,heads=16,kv-heads=4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """New sizes: units of the residual stream, of feed-forward layers, heads of both kinds."""

    hidden: int
    ffn: int
    heads: int
    keys: int


def parse_widths(text: str) -> dict[str, int]:
    """Parse `hidden=2048,ffn=5632,heads=16,kv-heads=4`, any of them.

    Raises:
        RecipeError: not of that form, an unknown name, or one that is named twice.
    """
    found: dict[str, int] = {}
    for item in text.split(","):
        match = SIZE.fullmatch(item.strip())
        if match is None or match[1] not in NAMES:
            fact = f"{item.strip()[:40]!r} is no size of {', '.join(NAMES)}"
            raise RecipeError(f"--width {text[:80]}", fact, EXAMPLE)
        if match[1] in found:
            raise RecipeError(f"--width {text[:80]}", f"names {match[1]} twice", EXAMPLE)
        found[match[1]] = int(match[2])
    return found


def sizes_beside(old: Widths, new: Widths) -> dict[str, tuple[int, int]]:
    """Return old and new size by name."""
    return {
        "hidden": (old.hidden, new.hidden),
        "ffn": (old.ffn, new.ffn),
        "heads": (old.heads, new.heads),
        "kv-heads": (old.keys, new.keys),
    }


def heads_left(asked: Mapping[str, int], old: Widths) -> int:
    """Return how many query heads stay where only groups are cut: those of the groups."""
    keys = asked.get("kv-heads", old.keys)
    return keys * (old.heads // old.keys)


def check_sizes(old: Widths, new: Widths, width: str) -> None:
    """Refuse sizes that are larger, the same, or that break groups of heads.

    Raises:
        RecipeError: one does.
    """
    pairs = sizes_beside(old, new)
    larger = next((name for name, (was, now) in pairs.items() if now > was), None)
    if larger is not None:
        was, now = pairs[larger]
        raise RecipeError(f"--width {width}", f"{larger}={now} is above the model's {was}")
    if all(was == now for was, now in pairs.values()):
        raise RecipeError(f"--width {width}", "is the model's own size", "give a smaller one")
    if new.heads % new.keys:
        fact = f"leaves {new.heads} heads for {new.keys} groups of keys and values"
        raise RecipeError(f"--width {width}", fact, "heads must be a multiple of kv-heads")
    if new.heads // new.keys > old.heads // old.keys:
        group = old.heads // old.keys
        fact = f"asks for {new.heads // new.keys} heads a group, and a group has {group}"
        remedy = f"with kv-heads={new.keys} give heads={new.keys * group} at most"
        raise RecipeError(f"--width {width}", fact, remedy)
