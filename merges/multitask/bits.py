"""Masks as bits: eight weights a byte, the first in the lowest bit."""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

from surgery.method import Tensor
from surgery.slices import PART

Array = Any  # a numpy array: numpy is imported inside functions
WIDTH = 8  # bits


def packed_shape(shape: Sequence[int], tasks: int) -> tuple[int, int]:
    """Return the shape of the masks of a tensor: a row of eight weights has a byte per task."""
    return -(-prod(shape) // WIDTH), tasks


def blocks(tensors: Sequence[Any]) -> Iterator[list[Tensor]]:
    """Read equal tensors side by side, some 64 Ki elements at a time, flat and in order.

    Args:
        tensors: `surgery.stored.Stored`.
    """
    shape = tensors[0].shape
    if not shape:
        yield [tensor[...].reshape(1) for tensor in tensors]
    elif len(shape) > 2:  # noqa: PLR2004 - a stack of matrices
        for entry in range(shape[0]):
            yield from blocks([tensor[entry] for tensor in tensors])
    else:
        step = block_size(shape) // max(prod(shape[1:]), 1)
        for at in range(0, shape[0], step):
            yield [tensor[at : at + step].reshape(-1) for tensor in tensors]


def block_size(shape: Sequence[int]) -> int:
    """Return the elements of a block: some 64 Ki, in whole rows."""
    row = max(prod(shape[1:]) if len(shape) <= 2 else shape[-1], 1)  # noqa: PLR2004 - a matrix
    return max(PART // row, 1) * row


class Packer:
    """Packs masks as they come, in pieces of any length; bits that fill no byte yet wait."""

    def __init__(self, tasks: int) -> None:
        import numpy as np

        self._rest: Array = np.empty((0, tasks), np.uint8)

    def feed(self, masks: Sequence[Tensor]) -> Tensor:
        """Take the next weights of every task; return whole rows, [rows, tasks]."""
        import numpy as np

        new = np.stack([mask.numpy().astype(np.uint8) for mask in masks], axis=1)
        bits = np.concatenate([self._rest, new])
        whole = len(bits) // WIDTH * WIDTH
        self._rest = bits[whole:]
        return _packed(bits[:whole])

    def end(self) -> Tensor:
        """Return the last row, filled up with zeros, or none."""
        return _packed(self._rest)


def _packed(bits: Array) -> Tensor:
    import numpy as np
    import torch

    return torch.from_numpy(np.packbits(bits, axis=0, bitorder="little"))


def unpacked(masks: Any, task: int, start: int, count: int) -> Tensor:  # noqa: ANN401 - Stored
    """Return one task's mask of flat weights from `start` on, as zeros and ones.

    Args:
        masks: stored, [rows, tasks].
    """
    import numpy as np
    import torch

    first, last = start // WIDTH, -(-(start + count) // WIDTH)
    column = masks[first:last, task : task + 1].reshape(-1)
    bits = np.unpackbits(column.numpy().astype(np.uint8), bitorder="little")
    begin = start - first * WIDTH
    return torch.from_numpy(bits[begin : begin + count]).to(column.dtype)
