"""Linear expressions of models: `new + 0.8 * (tuned - old)` becomes a number for each name."""

import re
from dataclasses import dataclass
from fractions import Fraction

from surgery.errors import RecipeError

TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,2})?)(?![\w.])"
    r"|(?P<name>[^\W\d]\w*)|(?P<sign>[-+*/()]))"
)
LONGEST = 2000  # characters
DEEPEST = 50  # parentheses and signs within one another
NUMBER = ""  # the name of what is no model


def parse_expression(text: str, *, place: str = "expression") -> dict[str, float]:
    """Return each model's coefficient, in the order of first mention.

    Names are identifiers; + - * / and parentheses mean what they always do, where the result
    is a sum of models times numbers. Coefficients are exact before they become floats.

    Args:
        text: the expression.
        place: what the error is about.

    Raises:
        RecipeError: the text is no such expression; the message shows where it stops being one.
    """
    if len(text) > LONGEST:
        raise RecipeError(place, f"has {len(text)} characters; {LONGEST} are read")
    reader = _Reader(text, place)
    form = reader.sum(0)
    if reader.kind:
        raise reader.wrong("an operator")
    constant = form.pop(NUMBER, Fraction(0))
    if not form:
        raise RecipeError(place, f"{text.strip()!r} names no model")
    if constant:
        fact = f"{text.strip()!r} adds the number {float(constant):g} to models"
        raise RecipeError(place, fact, "numbers can only multiply or divide models")
    return {name: _float(value, name, place) for name, value in form.items()}


def _float(value: Fraction, name: str, place: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise RecipeError(place, f"the coefficient of {name} is too large") from None


Form = dict[str, Fraction]


@dataclass(slots=True)
class _Reader:
    """Reads tokens from left to right; `kind` and `word` are the next one, empty at the end."""

    text: str
    place: str
    at: int = 0
    kind: str = ""
    word: str = ""

    def __post_init__(self) -> None:
        self._advance()

    def _advance(self) -> None:
        self.at += len(self.word)
        self.at += len(self.text[self.at :]) - len(self.text[self.at :].lstrip())
        found = TOKEN.match(self.text, self.at)
        self.kind, self.word = "", ""
        if found:
            self.kind, self.word = str(found.lastgroup), found[str(found.lastgroup)]
        elif self.at < len(self.text):
            raise self.wrong("a name, a number or an operator")

    def wrong(self, wanted: str) -> RecipeError:
        if self.at >= len(self.text):
            return RecipeError(self.place, f"{self.text.strip()!r} ends where {wanted} should be")
        rest = self.text[self.at :].split()[0]
        fact = f"{rest!r} at character {self.at + 1} stands where {wanted} should be"
        return RecipeError(self.place, fact, "write it like: new + 0.8 * (tuned - old)")

    def _take(self, signs: str) -> str:
        """Return the next token and pass it, if it is one of these signs."""
        if self.kind != "sign" or self.word not in signs:
            return ""
        sign = self.word
        self._advance()
        return sign

    def sum(self, depth: int) -> Form:
        form = self._product(depth)
        while sign := self._take("+-"):
            other = self._product(depth)
            for name, value in other.items():
                form[name] = form.get(name, Fraction(0)) + (value if sign == "+" else -value)
        return form

    def _product(self, depth: int) -> Form:
        form = self._one(depth)
        while sign := self._take("*/"):
            at = self.at
            other = self._one(depth)
            if sign == "*":
                form = self._times(form, other)
                continue
            if set(other) != {NUMBER} or not other[NUMBER]:
                fact = f"divides by zero or by a model at character {at + 1}"
                raise RecipeError(self.place, fact, "divide by a number")
            form = {name: value / other[NUMBER] for name, value in form.items()}
        return form

    def _times(self, form: Form, other: Form) -> Form:
        if set(form) == {NUMBER}:
            form, other = other, form
        if set(other) != {NUMBER}:
            names = " and ".join(sorted((set(form) | set(other)) - {NUMBER}))
            fact = f"multiplies models with each other ({names})"
            raise RecipeError(self.place, fact, "only numbers can multiply a model")
        return {name: value * other[NUMBER] for name, value in form.items()}

    def _one(self, depth: int) -> Form:
        if depth > DEEPEST:
            raise RecipeError(self.place, f"is nested more than {DEEPEST} deep")
        if sign := self._take("+-"):
            inner = self._one(depth + 1)
            return inner if sign == "+" else {name: -value for name, value in inner.items()}
        if self._take("("):
            inner = self.sum(depth + 1)
            if not self._take(")"):
                raise self.wrong("a closing parenthesis")
            return inner
        if self.kind not in {"name", "number"}:
            raise self.wrong("a name, a number or a parenthesis")
        word, number = self.word, self.kind == "number"
        self._advance()
        return {NUMBER: Fraction(word)} if number else {word: Fraction(1)}
