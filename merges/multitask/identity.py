"""Whether a base is the one that a store was made from, whatever dtype or files it lies in."""

from typing import Any

from surgery.digest import Leaves, checksums, combine
from surgery.method import Tensor

DIGITS = 12  # hexadecimal, so that a float64 holds the number exactly


class Checksum:
    """Takes a tensor's values in order, in any pieces; gives a number that tells them."""

    def __init__(self) -> None:
        self._leaves = Leaves(checksums)

    def feed(self, values: Tensor) -> None:
        """Take the next values, as float32."""
        array: Any = values.float().contiguous().numpy()
        self._leaves.feed(memoryview(array).cast("B"))

    def figure(self) -> float:
        """Return a number of 48 bits."""
        return float(int(combine(self._leaves.end())[:DIGITS], 16))
