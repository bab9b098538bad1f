"""Put singular vectors of several task vectors together, made orthogonal to one another."""

from collections.abc import Callable

from merges.stages.matrices import Held, Merged, Vectors
from merges.stages.spectrum import DECOMPOSING, gram, inverse_root, squares
from surgery.method import Tensor


def recombined(
    vectors: Vectors,
    left: Callable[[list[Tensor]], Tensor],
    right: Tensor,
    values: Tensor,
    tolerance: float,
) -> Merged:
    """Return the function to P diag(values) Q^T, P and Q the polar factors of left and right.

    Shapes: a block of left [rows, rank], right [width, rank], values [rank]. Directions that
    left or right hold more than once are shared, not filled up: P and Q are polar factors on
    their range.

    Args:
        left: from a block of the task vectors the same block of the left singular vectors.
    """
    turn = inverse_root(right.T @ right, tolerance)
    found = gram((left(block) for block in vectors.blocks()), values.numel())
    factor = (inverse_root(found, tolerance) * values) @ turn
    del found, turn
    factor = factor @ right.T
    return lambda block: left(block) @ factor


def recombining(side: int) -> Held:
    """Return what is held, for matrices with `side` singular values."""
    return Held(squares(DECOMPOSING + 2.2, side), squares(2.2, side))  # right and turn; factor
