"""Sums over the elements of two tensors, and the figures made from them."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import fsum, sqrt

HUGE = 1e300  # squares of float32 stay below 1e77, so only float64 can get here


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Sums over the elements of tensors a and b, in float64.

    Attributes:
        count: elements.
        aa, bb, ab: dot products of a with itself, b with itself, a with b.
        dd: squared length of b - a.
        max_abs: the largest |b - a|.
        equal: elements with a = b.
        agree: elements with the same sign; zero has its own.
    """

    count: int
    aa: float
    bb: float
    ab: float
    dd: float
    max_abs: float
    equal: int
    agree: int

    @property
    def is_sound(self) -> bool:
        """Whether both tensors held neither NaN nor infinity nor what overflows when squared."""
        return all(abs(value) < HUGE for value in (self.aa, self.bb, self.ab, self.dd))


def add(parts: Iterable[Sums]) -> Sums:
    """Add sums up, exactly rounded, so that no order or grouping of slices shows."""
    kept = list(parts)
    return Sums(
        count=sum(part.count for part in kept),
        aa=fsum(part.aa for part in kept),
        bb=fsum(part.bb for part in kept),
        ab=fsum(part.ab for part in kept),
        dd=fsum(part.dd for part in kept),
        max_abs=max((part.max_abs for part in kept), default=0.0),
        equal=sum(part.equal for part in kept),
        agree=sum(part.agree for part in kept),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """How b differs from a; None where a figure has no value, as the cosine of a zero vector.

    Attributes:
        relative_l2: ||b - a|| / ||a||.
        cosine: of the angle between a and b.
        sign_agreement: share of elements with the same sign.
        norm_ratio: ||b|| / ||a||.
        max_abs: the largest |b - a|.
        equal: share of equal elements.
    """

    relative_l2: float | None
    cosine: float | None
    sign_agreement: float | None
    norm_ratio: float | None
    max_abs: float | None
    equal: float | None
    norm_a: float | None = None
    norm_b: float | None = None


IDENTICAL = Figures(
    relative_l2=0.0, cosine=1.0, sign_agreement=1.0, norm_ratio=1.0, max_abs=0.0, equal=1.0
)


def figures(sums: Sums) -> Figures:
    """Return the figures of sums over at least one element."""
    norm_a, norm_b = sqrt(sums.aa), sqrt(sums.bb)
    same = sums.equal == sums.count
    return Figures(
        relative_l2=0.0 if same else _ratio(sqrt(sums.dd), norm_a),
        cosine=1.0 if same else _cosine(sums.ab, norm_a, norm_b),
        sign_agreement=sums.agree / sums.count,
        norm_ratio=1.0 if same else _ratio(norm_b, norm_a),
        max_abs=sums.max_abs,
        equal=sums.equal / sums.count,
        norm_a=norm_a,
        norm_b=norm_b,
    )


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None


def _cosine(dot: float, norm_a: float, norm_b: float) -> float | None:
    if not norm_a or not norm_b:
        return None
    return max(-1.0, min(1.0, dot / norm_a / norm_b))
