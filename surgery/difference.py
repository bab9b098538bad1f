"""How two tensors, layers or models differ: sums over elements, and figures made from them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from math import fsum, sqrt
from typing import Any, Literal, TypeVar

from surgery.anatomy import PART_ORDER

Key = TypeVar("Key", int, str, tuple[int, str])
# identical: the same bytes; compared: measured; differs: other bytes, which cannot be measured.
State = Literal["identical", "compared", "differs"]
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


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDifference:
    """Two tensors of one name and shape.

    Attributes:
        layer, module: where it stands in the stack of layers; None outside.
        part: what it is for, such as "attention".
        sums: None where there is nothing to compute with.
        note: why a tensor that differs was not measured.
    """

    name: str
    layer: int | None
    module: str | None
    part: str
    dtype_a: str
    dtype_b: str
    shape: tuple[int, ...]
    state: State
    sums: Sums | None = None
    note: str | None = None

    @property
    def figures(self) -> Figures | None:
        """The figures, where there are any."""
        if self.sums and self.sums.count:
            return figures(self.sums)
        return IDENTICAL if self.state == "identical" else None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        kept = ("name", "layer", "module", "part", "dtype_a", "dtype_b", "state", "note")
        plain = {key: getattr(self, key) for key in kept}
        return plain | {"shape": list(self.shape)} | _plain(self.figures)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Tensors taken as one long vector: a layer, a module of a layer, a part, the model.

    Attributes:
        tensors, identical, unmeasured: how many there are, have the same bytes, and differ in a
            way that could not be measured; the figures leave these out.
    """

    tensors: int
    identical: int
    unmeasured: int
    figures: Figures | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        counts = ("tensors", "identical", "unmeasured")
        return {key: getattr(self, key) for key in counts} | _plain(self.figures)


def _plain(found: Figures | None) -> dict[str, Any]:
    return asdict(found) if found else dict.fromkeys(asdict(IDENTICAL))


def group(tensors: Sequence[TensorDifference]) -> Group:
    """Take tensors as one."""
    identical = sum(t.state == "identical" for t in tensors)
    sums = add(t.sums for t in tensors if t.sums)
    same = IDENTICAL if identical == len(tensors) else None
    return Group(
        tensors=len(tensors),
        identical=identical,
        unmeasured=sum(t.state == "differs" for t in tensors),
        figures=figures(sums) if sums.count else same,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """A name that stands for tensors of two shapes."""

    name: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two checkpoints."""

    ref: str
    name: str
    family: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How checkpoint b differs from a.

    Attributes:
        tensors: those in both with the same shape, in a's order.
        modules: names of modules within layers, in the order in which they are shown.
    """

    a: Side
    b: Side
    tensors: tuple[TensorDifference, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    mismatched: tuple[Mismatch, ...]
    modules: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def is_identical(self) -> bool:
        """Whether both hold the same tensors with the same bytes."""
        apart = self.only_in_a or self.only_in_b or self.mismatched
        return not apart and all(t.state == "identical" for t in self.tensors)

    @property
    def total(self) -> Group:
        """All tensors as one."""
        return group(self.tensors)

    @property
    def layers(self) -> dict[int, Group]:
        """Each layer as one, by number."""
        return _grouped(self.tensors, lambda t: t.layer)

    @property
    def parts(self) -> dict[str, Group]:
        """Each part of the model as one, by name."""
        found = _grouped(self.tensors, lambda t: t.part)
        return {part: found[part] for part in PART_ORDER if part in found}

    @property
    def cells(self) -> dict[tuple[int, str], Group]:
        """Each module of each layer as one: what the heat map shows."""
        return _grouped(self.tensors, lambda t: _cell(t.layer, t.module))

    @property
    def layer_parts(self) -> dict[tuple[int, str], Group]:
        """Each part of each layer as one."""
        return _grouped(self.tensors, lambda t: _cell(t.layer, t.part))

    def most_changed(self, count: int) -> list[TensorDifference]:
        """Return the measured tensors that are not identical, the most changed first."""
        changed = [t for t in self.tensors if t.figures and t.state != "identical"]
        return sorted(changed, key=_by_change)[:count]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        return {
            "a": asdict(self.a),
            "b": asdict(self.b),
            "identical": self.is_identical,
            "total": self.total.as_dict(),
            "parts": [{"part": name} | found.as_dict() for name, found in self.parts.items()],
            "layers": [{"layer": number} | g.as_dict() for number, g in self.layers.items()],
            "modules": list(self.modules),
            "cells": [
                {"layer": layer, "module": module} | found.as_dict()
                for (layer, module), found in self.cells.items()
            ],
            "tensors": [t.as_dict() for t in self.tensors],
            "only_in_a": list(self.only_in_a),
            "only_in_b": list(self.only_in_b),
            "mismatched": [asdict(mismatch) for mismatch in self.mismatched],
            "notes": list(self.notes),
        }


def _cell(layer: int | None, name: str | None) -> tuple[int, str] | None:
    return None if layer is None or name is None else (layer, name)


def _by_change(tensor: TensorDifference) -> tuple[float, str]:
    """Order by relative L2; a tensor that was all zeros has changed beyond measure."""
    found = tensor.figures
    change = found.relative_l2 if found else None
    return (-float("inf") if change is None else -change), tensor.name


def _grouped(
    tensors: Iterable[TensorDifference], key: Callable[[TensorDifference], Key | None]
) -> dict[Key, Group]:
    found: dict[Any, list[TensorDifference]] = {}
    for tensor in tensors:
        if (at := key(tensor)) is not None:
            found.setdefault(at, []).append(tensor)
    return {at: group(found[at]) for at in sorted(found)}
