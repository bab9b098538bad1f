"""Views that widening needs beside resizing: shifted gains, and rows from the next layer."""

from typing import TYPE_CHECKING, Any

from surgery.checkpoint import TensorInfo, View, make_view, read_rows
from surgery.checkpoint.view import ReadRows

if TYPE_CHECKING:
    import numpy as np
    import torch

    Flags = np.ndarray[Any, np.dtype[np.bool_]]
    Floats = np.ndarray[Any, np.dtype[np.float64]]


def gains_times(tensor: TensorInfo, factors: "Floats") -> View:
    """Return gains that are stored as what is above one, each multiplied: (1 + w) f - 1."""

    def make(read: ReadRows, start: int, count: int) -> "torch.Tensor":
        import torch

        factor = torch.from_numpy(factors[start : start + count].copy())
        made: torch.Tensor = (1 + read_rows(read, tensor, start, count).double()) * factor - 1
        return made

    return make_view(
        tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        stored=(tensor,),
        make=make,
        why="widen",
        key=f"gains {factors.tobytes().hex()} {getattr(tensor, 'key', '')}",
        held=getattr(tensor, "held", 0),
    )


def blended(own: TensorInfo, other: TensorInfo, *, axis: int, flags: "Flags") -> View:
    """Return `own` with the indices of an axis where `flags` holds taken from `other`."""
    columns = len(own.shape) > 1 and axis == len(own.shape) - 1

    def make(read: ReadRows, start: int, count: int) -> "torch.Tensor":
        import torch

        first = read_rows(read, own, start, count)
        second = read_rows(read, other, start, count).to(first.dtype)
        marks = torch.from_numpy(flags if columns else flags[start : start + count].copy())
        if not columns:
            marks = marks.view(-1, *[1] * (first.dim() - 1))
        return torch.where(marks, second, first)

    return make_view(
        own.name,
        dtype=own.dtype,
        shape=own.shape,
        stored=(own, other),
        make=make,
        why="widen, copies from the next layer",
        key=f"{axis} {flags.tobytes().hex()} {getattr(own, 'key', '')} {getattr(other, 'key', '')}",
        held=getattr(own, "held", 0) + getattr(other, "held", 0),
    )
