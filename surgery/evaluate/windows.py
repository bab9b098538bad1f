"""The sliding windows over one document: pure integers, no tensors."""

from collections.abc import Iterator
from dataclasses import dataclass

from surgery.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Window:
    """One row fed to a model: tokens `begin` to `end - 2` in, `score_from` to `end - 1` predicted.

    With `sink`, token 0 (the beginning-of-sequence mark) is fed once more in front of `begin`.
    """

    begin: int
    end: int
    score_from: int
    sink: bool = False

    @property
    def width(self) -> int:
        """Number of tokens fed."""
        return self.end - 1 - self.begin + self.sink

    def position(self, token: int) -> int:
        """Return the place in the row whose logits predict `token`."""
        return token - 1 - self.begin + self.sink


def plan_windows(
    tokens: int, *, context: int, stride: int, given: int = 1, sink: bool = False
) -> Iterator[Window]:
    """Score tokens `given` to `tokens - 1` once each, with the most context the stride allows.

    Units: all in tokens. A window feeds at most `context` tokens; its end moves on by `stride`,
    and it reaches back as far as `context` lets it. So a token has all that came before it, or
    at least `context - stride + 1` tokens; a stride of 1 gives every token the full context.

    Raises:
        RecipeError: The context is below 1, or the stride is not within 1 and the context.
    """
    check_windows(context, stride)
    end, scored = min(tokens, context + 1), given
    while scored < tokens:
        if end > scored:
            yield _window(end, context=context, score_from=scored, sink=sink)
            scored = end
        end = min(tokens, end + stride)


def check_windows(context: int, stride: int) -> None:
    """Refuse windows that would feed nothing or leave tokens out.

    Raises:
        RecipeError: The context is below 1, or the stride is not within 1 and the context.
    """
    if context < 1:
        raise RecipeError("--context", f"{context} tokens is no context", "give 1 or more")
    if not 1 <= stride <= context:
        raise RecipeError(
            "--stride", f"{stride} is outside 1 to {context}, the context", "give one inside"
        )


def _window(end: int, *, context: int, score_from: int, sink: bool) -> Window:
    begin = max(0, end - 1 - context)
    if sink and begin:
        return Window(begin + 1, end, score_from, sink=True)
    return Window(begin, end, score_from)
