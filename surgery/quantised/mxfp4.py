"""The view of GPT-OSS's experts: MXFP4 blocks along what the layer takes in, stored transposed."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import TensorInfo, View, make_view
from surgery.checkpoint.view import ReadRows
from surgery.errors import CheckpointError
from surgery.pieces import Recent, flat, rows_from
from surgery.quantised.numbers import scale_floats, unpack

if TYPE_CHECKING:
    import torch

BLOCK = 32  # numbers that share a scale
BYTES = BLOCK // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Experts' weights in MXFP4, as transformers lays them out.

    Attributes:
        name: of the weight it stands for, [experts, inputs, outputs].
        codes: [experts, outputs, inputs / 32, 16] of two numbers a byte.
        scales: [experts, outputs, inputs / 32] exponents.
        recent: keeps the expert that is being read: each of its rows lies all over it.
    """

    name: str
    codes: TensorInfo
    scales: TensorInfo
    recent: Recent

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the weight."""
        experts, outputs, groups = self.scales.shape
        return experts, groups * BLOCK, outputs

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """All that is read."""
        return self.codes, self.scales

    def view(self, dtype: str) -> View:
        """Return the weight as a view.

        Raises:
            CheckpointError: blocks and scales are not of one weight.
        """
        if len(self.scales.shape) != 3 or self.codes.shape != (*self.scales.shape, BYTES):  # noqa: PLR2004
            fact = f"{self.codes.name!r} and its scales are no MXFP4 weight of three axes"
            raise CheckpointError(self.codes.file, fact, "the checkpoint is damaged")
        held = (self.codes.nbytes + self.scales.nbytes) // max(self.shape[0], 1)
        return make_view(
            self.name,
            dtype=dtype,
            shape=self.shape,
            stored=self.stored,
            make=self.rows,
            why="dequantise",
            key="mxfp4",
            held=held,
        )

    def rows(self, read: ReadRows, start: int, count: int) -> "torch.Tensor":
        """Return rows as float32, [count, outputs]: inputs of one expert after another."""
        pieces = rows_from(start, count, self.shape[1])
        import torch

        return torch.cat([self._rows(read, *piece) for piece in pieces])

    def _rows(self, read: ReadRows, expert: int, start: int, count: int) -> "torch.Tensor":
        codes, exponents = self.recent.get(
            (self.codes.file, self.codes.name, expert), lambda: self._expert(read, expert)
        )
        first, last = start // BLOCK, (start + count - 1) // BLOCK + 1
        part = codes[:, first * BYTES : last * BYTES].contiguous()
        values = unpack(part, "fp4", (last - first) * BLOCK)
        scales = scale_floats(exponents[:, first:last].contiguous(), "U8")
        values.view(len(values), -1, BLOCK).mul_(scales[:, :, None])
        return values.T[start - first * BLOCK :][:count]

    def _expert(self, read: ReadRows, expert: int) -> Any:  # noqa: ANN401 - two tensors
        outputs, groups = self.scales.shape[1:]
        codes = flat(self.codes, groups * BYTES), flat(self.scales, groups)
        return tuple(read(tensor, expert * outputs, outputs) for tensor in codes)
