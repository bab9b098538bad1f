"""Which modules are meant, by parts of their names."""

import re
from collections.abc import Iterable, Sequence

from surgery.errors import RecipeError
from surgery.recipe.settings import Filter


class Choice:
    """Which modules are asked for; each filter has to match one."""

    def __init__(self, include: Iterable[str], exclude: Iterable[str]) -> None:
        self._include = [(text, parse_filter("--include", text)) for text in include]
        self._exclude = [(text, parse_filter("--exclude", text)) for text in exclude]

    def pick(self, modules: Sequence[str]) -> set[str]:
        """Return the modules meant.

        Raises:
            RecipeError: a filter matches none.
        """
        for option, asks in (("--include", self._include), ("--exclude", self._exclude)):
            for text, ask in asks:
                if not any(ask.matches(module) for module in modules):
                    raise RecipeError(f"{option} {text}", "matches no linear layer")
        included = [m for m in modules if not self._include or _any(self._include, m)]
        return {module for module in included if not _any(self._exclude, module)}


def _any(asks: Sequence[tuple[str, Filter]], module: str) -> bool:
    return any(ask.matches(module) for _, ask in asks)


def parse_filter(option: str, text: str) -> Filter:
    """Parse a part of names, `glob:PATTERN` or `regex:PATTERN`.

    Raises:
        RecipeError: it is empty, or no regular expression.
    """
    kind, colon, rest = text.partition(":")
    if not text or (colon and kind in {"glob", "regex"} and not rest):
        raise RecipeError(option, "is empty", "name a part of module names")
    if not colon or kind not in {"glob", "regex"}:
        return Filter("substring", text)
    try:
        re.compile(rest if kind == "regex" else "")
    except re.error as error:
        raise RecipeError(f"{option} {text}", f"is no regular expression ({error})") from error
    return Filter("regex" if kind == "regex" else "glob", rest)
