"""The order of a pipeline's steps: each uses only what stands before it."""

from collections.abc import Callable, Mapping, Sequence

from surgery.errors import RecipeError


def check_order(uses: Mapping[str, Sequence[str]], place: Callable[[str], str] = str) -> None:
    """Check that steps, in the order given, use only earlier ones.

    Args:
        uses: per step the steps whose output it takes.
        place: tells where a step is written.

    Raises:
        RecipeError: steps that use each other in a circle, or one that is used too early.
    """
    circle = _circle(uses)
    if circle:
        told = ", which uses ".join(repr(name) for name in (*circle[1:], circle[0]))
        fact = f"uses {told}" if len(circle) > 1 else "uses its own output"
        raise RecipeError(place(circle[0]), fact, "no order of the steps can satisfy that")
    done: set[str] = set()
    for name, taken in uses.items():
        early = next((other for other in taken if other not in done), None)
        if early is not None:
            fact = f"uses {early!r}, which is defined only after it"
            raise RecipeError(place(name), fact, f"move {early!r} above {name!r}")
        done.add(name)


def users(uses: Mapping[str, Sequence[str]], name: str) -> tuple[str, ...]:
    """Return the steps that take the output of `name`."""
    return tuple(other for other, taken in uses.items() if name in taken)


def _circle(uses: Mapping[str, Sequence[str]]) -> list[str]:
    """Return steps of which each uses the next and the last the first, or nothing."""
    left = dict(uses)
    before = -1
    while before != len(left):
        before = len(left)
        for name, taken in uses.items():
            if name in left and not any(other in left for other in taken):
                del left[name]
    trail: list[str] = []
    at = next(iter(left), None)
    while at is not None and at not in trail:
        trail.append(at)
        at = next(other for other in left[at] if other in left)
    return trail[trail.index(at) :] if at is not None else []
