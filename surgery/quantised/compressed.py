"""Weights that compressed-tensors packs: integers in 32-bit words, FP4 in bytes."""

import os
from collections.abc import Iterable
from dataclasses import replace

from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.checkpoint.header import open_regular, quoted
from surgery.errors import CheckpointError
from surgery.quantised.grid import Grid, lay
from surgery.quantised.packed import Quantised
from surgery.quantised.scheme import REMEDY, Scheme

WORD = 32
WIDTHS = (2, 4, 8)  # bits of integers that are read; others changed their layout between versions
MAX_AXES = 4


def packed(checkpoint: Checkpoint, scheme: Scheme, codes: TensorInfo) -> Quantised:
    """Return the weight that `NAME.weight_packed` holds the numbers of.

    Raises:
        CheckpointError: what belongs to it is missing or does not fit.

    Source: https://github.com/vllm-project/compressed-tensors (compressors/), 0.20.
    """
    stem = codes.name.removesuffix("_packed")

    def part(ending: str) -> TensorInfo | None:
        return checkpoint.tensors.get(stem + ending)

    scale, zero, order = part("_scale"), part("_zero_point"), part("_g_idx")
    told = part("_shape")
    if scale is None:
        raise _bad(codes, "has no weight_scale")
    floats = codes.dtype == "U8"
    stored = _read_shape(told) if told else None
    bits = 4 if floats else _bits(codes, stored, {g.get("num_bits") for g in scheme.groups})
    per_row = codes.shape[-1] * (8 if floats else WORD) // bits
    shape = stored or (*codes.shape[:-1], per_row)
    if len(shape) < 2 or shape[:-1] != codes.shape[:-1] or shape[-1] > per_row:  # noqa: PLR2004
        raise _bad(codes, f"of shape {list(codes.shape)} cannot be a weight of {list(shape)}")
    grid = lay(scale, shape, scheme.block)
    is_packed = zero is not None and zero.dtype == "I32"
    return Quantised(
        name=stem,
        shape=shape,
        codes=codes,
        code="fp4" if floats else f"int{bits}",
        scale=grid,
        zero=_zeros(zero, grid, shape, scheme, is_packed=is_packed) if zero else None,
        zero_bits=bits if is_packed else 0,
        divisor=part("_global_scale"),
        order=order,
        aside=(told,) if told else (),
    )


def _zeros(
    zero: TensorInfo, scales: Grid, shape: tuple[int, ...], scheme: Scheme, *, is_packed: bool
) -> Grid:
    """Return where zero points lie: those packed along the rows, where the scales do."""
    if not is_packed:
        return lay(zero, shape, scheme.block)
    if len(zero.shape) != 2 or zero.shape[1] != scales.stored.shape[1]:  # noqa: PLR2004
        raise _bad(zero, f"of shape {list(zero.shape)} does not fit its scales")
    return replace(scales, stored=zero)


def _bad(tensor: TensorInfo, fact: str) -> CheckpointError:
    remedy = f"the checkpoint is damaged, or of another format: {REMEDY}"
    return CheckpointError(tensor.file, f"{quoted(tensor.name)} {fact}", remedy)


def _bits(codes: TensorInfo, shape: tuple[int, ...] | None, told: Iterable[object]) -> int:
    """Return how wide the integers are: groups of modules may differ, so the shape decides."""
    widths = [bits for bits in WIDTHS if bits in set(told)]
    if shape is not None:
        widths = [bits for bits in widths if -(-shape[-1] * bits // WORD) == codes.shape[-1]]
    if len(widths) != 1 or codes.dtype != "I32":
        raise _bad(codes, f"is packed in a way that is not read ({', '.join(map(str, told))} bits)")
    return widths[0]


def _read_shape(tensor: TensorInfo) -> tuple[int, ...]:
    """Read the shape that is stored as a tensor of a few integers: no weight is read for it."""
    width = {"I64": 8, "I32": 4}.get(tensor.dtype)
    if width is None or not 0 < tensor.numel <= MAX_AXES:
        raise _bad(tensor, f"of {tensor.dtype} is no shape")
    fd = open_regular(tensor.file)
    try:
        data = os.pread(fd, tensor.nbytes, tensor.offset)
    finally:
        os.close(fd)
    ends = range(0, len(data), width)
    return tuple(int.from_bytes(data[at : at + width], "little", signed=True) for at in ends)
