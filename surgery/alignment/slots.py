"""Where the units of a layer lie in its tensors: hidden units, heads, experts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import TensorInfo

if TYPE_CHECKING:
    import numpy as np

    Order = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """The units of a group along one axis of a tensor: unit u is at offset + u * stride.

    Attributes:
        tensor: of the model that is aligned.
        other: of the reference.
        axis: 0 for rows, 1 for columns.
        width: indices of a unit, one beside the other.
        weight: what inner products count.
    """

    tensor: TensorInfo
    other: TensorInfo
    axis: int = 0
    offset: int = 0
    stride: int = 1
    width: int = 1
    weight: float = 1.0

    @property
    def nbytes(self) -> int:
        """Bytes that comparing reads."""
        return self.tensor.nbytes + self.other.nbytes

    @property
    def held(self) -> int:
        """Bytes that comparing holds at once, beside floats: units along rows are held whole."""
        return self.nbytes if self.axis == 0 else 0

    def move(self, indices: "Order", order: "Order") -> None:
        """Write where the axis is to read from when place p takes unit order[p]."""
        import numpy as np

        inside = np.arange(self.width)
        to = self.offset + np.arange(len(order))[:, None] * self.stride + inside
        indices[to] = self.offset + order[:, None] * self.stride + inside


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Units that have a tensor each, such as experts.

    Attributes:
        tensors: of the model that is aligned, one per unit.
        others: of the reference.
        weight: what inner products count.
    """

    tensors: tuple[TensorInfo, ...]
    others: tuple[TensorInfo, ...]
    weight: float = 1.0
    held: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that comparing reads."""
        return sum(tensor.nbytes for tensor in (*self.tensors, *self.others))


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Units that may be exchanged without changing what the layer computes.

    There are `outer` coarse units (key-value heads, groups of experts) of `inner` fine units each
    (query heads, hidden units, experts). Fine units move inside their coarse unit and with it.

    Attributes:
        name: layer and kind, to tell the user.
        fine: where the outer * inner fine units lie.
        coarse: where the coarse units themselves lie.
        balanced: each slot counts by its cosine, so that small tensors are heard beside large.
    """

    name: str
    outer: int
    inner: int
    fine: tuple[Slot | Spread, ...]
    coarse: tuple[Slot, ...] = ()
    balanced: bool = False

    @property
    def units(self) -> int:
        """How many fine units there are."""
        return self.outer * self.inner

    @property
    def nbytes(self) -> int:
        """Bytes that comparing reads."""
        return sum(slot.nbytes for slot in (*self.fine, *self.coarse))
