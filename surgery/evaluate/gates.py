"""Limits for figures, such as `bpb<parent*1.02`: parsed by hand, and decided afterwards."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from surgery.errors import RecipeError

Limit = Callable[[float], float]

METRICS = ("bpb", "ppl", "kl", "kl_p50", "kl_p95", "kl_p99", "top1", "logit_rms")
_LIMIT = re.compile(r"\s*(?P<metric>acc:(?:'[^']+'|[\w.]+)|\w+)\s*(?P<sign><=|>=|<|>)(?P<rest>.*)")
_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,2})?)(?![\w.])(?P<percent>%?)"
    r"|(?P<parent>parent\b)|(?P<sign>[-+*/()]))"
)
_HOLDS: Mapping[str, Callable[[float, float], bool]] = MappingProxyType(
    {
        "<": lambda a, b: a < b,
        "<=": lambda a, b: a <= b,
        ">": lambda a, b: a > b,
        ">=": lambda a, b: a >= b,
    }
)
_LONGEST = 500
_DEEPEST = 20
_LIKE = 'write it like "bpb<parent*1.02" or "kl<0.05"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A limit: a metric, a comparison, and a value that may refer to the parent's.

    Attributes:
        text: What the user typed.
        metric: One of `METRICS`, or "acc:" and a task.
        sign: The comparison.
        limit: Returns the value to compare with, from the parent's figure.
        needs_parent: Whether the limit refers to the parent.
    """

    text: str
    metric: str
    sign: str
    limit: Limit
    needs_parent: bool

    @property
    def task(self) -> str | None:
        """Return the task whose accuracy it limits, or None."""
        return self.metric.removeprefix("acc:") if self.metric.startswith("acc:") else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gated:
    """What a gate says of one model.

    Attributes:
        gate: The limit, as it was typed.
        model: The model.
        parent: The parent it was compared with, or None.
        value: The model's figure, or None where there is none.
        limit: What it was compared with, or None, likewise.
        holds: Whether the limit is kept; one that cannot be decided is not.
    """

    gate: str
    model: str
    parent: str | None
    value: float | None
    limit: float | None
    holds: bool

    @property
    def sentence(self) -> str:
        """Say what was found."""
        which = self.model if self.parent is None else f"{self.model} beside {self.parent}"
        if self.value is None or self.limit is None:
            return f"{self.gate} cannot be decided for {which}: there is no such figure"
        kept = "holds" if self.holds else "fails"
        return f"{self.gate} {kept} for {which}: {self.value:.6g} against {self.limit:.6g}"


def parse_gate(text: str) -> Gate:
    """Return the gate that a text is: METRIC, one of < <= > >=, and a sum.

    The sum has numbers (a percent sign divides by 100), `parent` for the parent's figure of the
    same metric, + - * / and parentheses.

    Raises:
        RecipeError: The text is no gate.
    """
    found = _LIMIT.fullmatch(text) if len(text) <= _LONGEST else None
    if found is None:
        raise RecipeError(f"--gate {text}", "is no limit for a figure", _LIKE)
    metric = found["metric"].replace("'", "")
    if metric not in METRICS and not metric.startswith("acc:"):
        known = ", ".join((*METRICS, "acc:TASK"))
        raise RecipeError(f"--gate {text}", f"{metric} is not a figure", f"give one of {known}")
    reader = _Reader(text, found["rest"])
    limit = reader.whole()
    _try(text, limit)
    return Gate(
        text=text.strip(),
        metric=metric,
        sign=found["sign"],
        limit=limit,
        needs_parent=reader.needs_parent,
    )


def decide(
    gates: Sequence[Gate],
    model: str,
    figures: Mapping[str, float | None],
    *,
    parent: str | None = None,
    parents: Mapping[str, float | None] | None = None,
) -> list[Gated]:
    """Return what each gate says of a model, from its figures and its parent's by metric."""
    return [_decide(gate, model, figures, parent, parents or {}) for gate in gates]


def _decide(
    gate: Gate,
    model: str,
    figures: Mapping[str, float | None],
    parent: str | None,
    parents: Mapping[str, float | None],
) -> Gated:
    value, theirs = figures.get(gate.metric), parents.get(gate.metric)
    limit = None
    if theirs is not None or not gate.needs_parent:
        try:
            limit = gate.limit(theirs or 0.0)
        except ZeroDivisionError:
            limit = None
    holds = value is not None and limit is not None and _HOLDS[gate.sign](value, limit)
    return Gated(gate=gate.text, model=model, parent=parent, value=value, limit=limit, holds=holds)


def _try(text: str, limit: Limit) -> None:
    try:
        limit(1.0)
    except ZeroDivisionError:
        raise RecipeError(f"--gate {text}", "divides by zero", _LIKE) from None


class _Reader:
    """Reads a sum from left to right into one function of the parent's figure."""

    def __init__(self, text: str, rest: str) -> None:
        self.text, self.rest, self.needs_parent = text, rest.strip(), False

    def whole(self) -> Limit:
        limit = self._sum(0)
        if self.rest:
            raise self._wrong()
        return limit

    def _wrong(self) -> RecipeError:
        fact = f"stops making sense at {self.rest!r}" if self.rest else "ends too early"
        return RecipeError(f"--gate {self.text}", fact, _LIKE)

    def _take(self, signs: str) -> str:
        if self.rest and self.rest[0] in signs:
            sign, self.rest = self.rest[0], self.rest[1:].lstrip()
            return sign
        return ""

    def _sum(self, depth: int) -> Limit:
        left = self._product(depth)
        while sign := self._take("+-"):
            left = _joined(sign, left, self._product(depth))
        return left

    def _product(self, depth: int) -> Limit:
        left = self._factor(depth)
        while sign := self._take("*/"):
            left = _joined(sign, left, self._factor(depth))
        return left

    def _factor(self, depth: int) -> Limit:
        if depth > _DEEPEST:
            raise RecipeError(f"--gate {self.text}", "is nested too deep", _LIKE)
        if self._take("-"):
            inner = self._factor(depth + 1)
            return lambda parent: -inner(parent)
        if self._take("("):
            inner = self._sum(depth + 1)
            if not self._take(")"):
                raise self._wrong()
            return inner
        return self._term()

    def _term(self) -> Limit:
        found = _TOKEN.match(self.rest)
        if found is None or found["sign"]:
            raise self._wrong()
        self.rest = self.rest[found.end() :].lstrip()
        if found["parent"]:
            self.needs_parent = True
            return lambda parent: parent
        number = float(found["number"]) / (100 if found["percent"] else 1)
        return lambda _: number


def _joined(sign: str, left: Limit, right: Limit) -> Limit:
    if sign == "+":
        return lambda parent: left(parent) + right(parent)
    if sign == "-":
        return lambda parent: left(parent) - right(parent)
    if sign == "*":
        return lambda parent: left(parent) * right(parent)
    return lambda parent: left(parent) / right(parent)
