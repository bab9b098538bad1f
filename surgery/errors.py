"""The one family of errors that a user may see: place, fact, remedy."""

from enum import IntEnum

LONGEST = 600  # characters of a part of a message; a path has at most 4096, mostly far fewer


class Exit(IntEnum):
    """Exit codes of every command."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    VERIFICATION = 3
    INTERRUPTED = 75


class SurgeryError(Exception):
    """Something a user can act on, told in one sentence.

    The message is `place: fact; remedy`. Place is a file, a tensor or an option; the remedy may
    be empty where there is none.
    """

    exit_code = Exit.FAILED

    def __init__(self, place: object, fact: str, remedy: str = "") -> None:
        self.place = shortened(printable(str(place)))
        self.fact = shortened(printable(fact))
        self.remedy = shortened(printable(remedy))
        super().__init__(f"{self.place}: {self.fact}" + (f"; {self.remedy}" if remedy else ""))


class CheckpointError(SurgeryError):
    """An input is missing, broken, or of a kind that is not read."""


class RecipeError(SurgeryError):
    """What was asked for does not make sense, whatever the weights."""

    exit_code = Exit.USAGE


class PlanError(SurgeryError):
    """The ask is sound, but cannot be carried out here: disk, existing output, aliasing."""


class StepError(SurgeryError):
    """A step failed while running: read or write fault, non-finite result, changed input."""


class ResultError(StepError):
    """A result is not finite, or not of the planned shape: doing it again would not help."""


class TrainError(SurgeryError):
    """A forward or training pass cannot start or go on."""


class VerificationError(SurgeryError):
    """Something was checked, and it is not as it should be."""

    exit_code = Exit.VERIFICATION


class Interrupted(SurgeryError):
    """The run was stopped from outside; what is finished is kept for a resume."""

    exit_code = Exit.INTERRUPTED


def printable(text: str) -> str:
    """Return text with control characters escaped, so that a name cannot drive a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str) -> str:
    """Return text of at most `LONGEST` characters, the middle left out: a sentence stays one."""
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST * 2 // 3]} ... {text[-LONGEST // 3 :]}"
