"""The view of one quantised weight: codes, scales, zero points."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.checkpoint import TensorInfo, View, make_view
from surgery.checkpoint.view import ReadRows
from surgery.quantised.grid import Grid, spread
from surgery.quantised.numbers import scale_floats, unpack

if TYPE_CHECKING:
    import torch

    from surgery.quantised.grid import Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantised:
    """What one weight is made of.

    Attributes:
        name: of the weight it stands for.
        shape: of that weight.
        codes: its stored numbers, whose meaning `code` tells (`surgery.quantised.numbers`).
        scale: what they are multiplied by.
        zero: what is subtracted before.
        zero_bits: of zero points that are packed along the rows.
        divisor: one number that scales are divided by (NVFP4).
        order: per column the group of scales that it belongs to.
        aside: stored with it and not needed to read it.
    """

    name: str
    shape: tuple[int, ...]
    codes: TensorInfo
    code: str
    scale: Grid
    zero: Grid | None = None
    zero_bits: int = 0
    divisor: TensorInfo | None = None
    order: TensorInfo | None = None
    aside: tuple[TensorInfo, ...] = ()

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """All that is read."""
        zero = self.zero.stored if self.zero else None
        parts = (self.codes, self.scale.stored, zero, self.divisor, self.order, *self.aside)
        return tuple(part for part in parts if part is not None)

    def view(self, dtype: str) -> View:
        """Return the weight as a view."""
        return make_view(
            self.name,
            dtype=dtype,
            shape=self.shape,
            stored=self.stored,
            make=self.rows,
            why="dequantise",
            key=f"{self.code} {self.scale.height}x{self.scale.width}",
        )

    def rows(self, read: ReadRows, start: int, count: int) -> "torch.Tensor":
        """Return rows as float32, [count, columns]."""
        values = unpack(read(self.codes, start, count), self.code, self.shape[-1])
        order = read(self.order, 0, self.order.numel) if self.order else None
        if self.zero:
            numbers = self._zeros(read, start, count)
            spread(values, self.zero, numbers, "sub_", order)
        numbers = self.scale.of_rows(_floats(read), start, count)
        if self.divisor:
            numbers = numbers / read(self.divisor, 0, 1).reshape(()).float()
        spread(values, self.scale, numbers, "mul_", order)
        return values

    def _zeros(self, read: ReadRows, start: int, count: int) -> "torch.Tensor":
        import torch

        assert self.zero is not None  # noqa: S101 - told by the caller
        if not self.zero_bits:
            return self.zero.of_rows(lambda t, at, n: read(t, at, n).float(), start, count)
        stored, bits = self.zero.stored, self.zero_bits
        first, last = start * bits // 32, ((start + count) * bits - 1) // 32
        words = read(stored, first, last - first + 1)  # 32 bits along the rows
        numbers = unpack(
            words.T.clone(memory_format=torch.contiguous_format),
            f"int{bits}",
            words.shape[0] * 32 // bits,
        )
        skip = start - first * 32 // bits
        return numbers[:, skip : skip + count].T


def _floats(read: ReadRows) -> "Floats":
    return lambda tensor, start, count: scale_floats(read(tensor, start, count), tensor.dtype)
