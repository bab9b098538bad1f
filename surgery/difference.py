"""How two checkpoints differ: by tensor, layer, module and part."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

from surgery.anatomy import PART_ORDER
from surgery.sums import IDENTICAL, Figures, Sums, add, figures

Key = TypeVar("Key", int, str, tuple[int, str])
# identical: the same bytes; compared: measured; differs: other bytes, which cannot be measured.
State = Literal["identical", "compared", "differs"]


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
