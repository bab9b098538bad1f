"""A matrix for repeated inputs: copies of its inputs that add up to it, bit for bit."""

import itertools
import math
from typing import TYPE_CHECKING, Any

from growth.resized import Mix, gather, resized
from growth.widen.maps import key_of
from surgery.checkpoint import TensorInfo, View, make_view, read_rows
from surgery.checkpoint.view import ReadRows

if TYPE_CHECKING:
    import numpy as np
    import torch

    Floats = np.ndarray[Any, np.dtype[np.float64]]
    Integers = np.ndarray[Any, np.dtype[np.int64]]

# Bits of a number, the leading one included, and the exponent of the smallest above zero.
PRECISION = {"F64": (53, -1074), "F32": (24, -149), "F16": (11, -24), "BF16": (8, -133)}
MATRIX = 2
BLOCK = 1 << 18  # numbers that are split at once
FLOATS = 6  # arrays of as many numbers that the arithmetic holds
MOST_NOISE = 0.4  # so that no share is larger than the whole, which the grid could not hold


def split_inputs(
    tensor: TensorInfo,
    *,
    count: int,
    inputs: int,
    outputs: Mix | None = None,
    noise: float = 0.0,
    seed: int = 0,
) -> View:
    """Return a tensor with `count` copies of its inputs, one behind the other, that sum to it.

    Shares lie on the grid of the number they are shares of (its last bit), so that their sum is
    that number in its own dtype: dividing by three, or adding noise, would round each by itself.

    Args:
        tensor: of one axis or two.
        count: number of copies.
        inputs: the axis of inputs.
        outputs: the mix of the other axis.
        noise: standard deviation of a share, of its size; uniform, zero in sum over the copies,
            another for every output.
        seed: of the noise, together with the tensor's name.
    """
    last = inputs == len(tensor.shape) - 1 and len(tensor.shape) == MATRIX
    mixes = (None,) if len(tensor.shape) == 1 else (outputs, None) if last else (None, outputs)
    wide = resized(tensor, mixes)
    shape = list(wide.shape)
    shape[inputs] *= count
    old, key = wide.shape[inputs], key_of(f"{seed}\0{tensor.name}")
    line = count * math.prod(wide.shape[1:])
    block = max(BLOCK // line, 1)

    def make(read: ReadRows, start: int, rows: int) -> "torch.Tensor":
        import torch

        ends = [*range(start, start + rows, block), start + rows]
        return torch.cat([part(read, a, b) for a, b in itertools.pairwise(ends)])

    def part(read: ReadRows, start: int, end: int) -> "torch.Tensor":
        import numpy as np
        import torch

        numbers = np.arange(start, end)
        lines = numbers if last else numbers % old
        found = read_rows(read, wide, start, len(lines)) if last else gather(read, wide, lines)
        floats = found.double().numpy()
        errors = draw(floats.shape, lines, count, noise=noise, key=key) if noise else None
        parts = shares(floats, count, dtype=tensor.dtype, errors=errors)
        made = np.concatenate(parts, axis=1) if last else parts[numbers // old, numbers - start]
        return torch.from_numpy(made).to(found.dtype)  # exact: shares are numbers of that dtype

    return make_view(
        tensor.name,
        dtype=tensor.dtype,
        shape=tuple(shape),
        stored=(wide,),
        make=make,
        why=f"split over {count} copies" + (", with noise" if noise else ""),
        key=f"{inputs} {noise!r} {key} {getattr(wide, 'key', '')}",
        held=FLOATS * 8 * line * block + getattr(wide, "held", 0),
    )


def shares(whole: "Floats", count: int, *, dtype: str, errors: "Floats | None" = None) -> "Floats":
    """Split numbers into `count` that sum to them: [count, *shape of whole].

    Args:
        whole: the numbers.
        count: how many shares each is split into.
        dtype: what the numbers are stored as.
        errors: how much each share is off, of its size; zero in sum over the shares.
    """
    import numpy as np

    bits, lowest = PRECISION[dtype]
    exponent = np.maximum(np.frexp(whole)[1] - bits, lowest)
    parts = np.repeat(whole[None] / count, count, axis=0)
    if errors is not None:
        parts += parts * errors
    parts = np.ldexp(np.rint(np.ldexp(parts, -exponent)), exponent)
    parts[-1] = whole - parts[:-1].sum(axis=0)
    return np.asarray(parts)


def draw(
    shape: tuple[int, ...], lines: "Integers", count: int, *, noise: float, key: int
) -> "Floats":
    """Draw uniform numbers whose sum over `count` copies is zero: [count, *shape].

    Args:
        shape: of what is split.
        lines: per row its number, by which its stream is chosen, whoever reads which rows.
        count: number of copies.
        noise: standard deviation.
        key: of all streams.
    """
    import numpy as np

    size = math.prod(shape[1:])
    drawn = np.empty((len(lines), count, size))
    for row, line in enumerate(lines.tolist()):
        stream = np.random.Philox(key=key, counter=[0, 0, line, 0])
        drawn[row] = (stream.random_raw(count * size) >> 11).reshape(count, size) * 2.0**-53
    drawn -= drawn.mean(axis=1, keepdims=True)
    drawn *= noise * math.sqrt(12 * count / (count - 1))  # the deviation of one is 1 / sqrt 12
    return np.moveaxis(drawn, 1, 0).reshape(count, *shape)
