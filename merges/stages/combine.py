"""Combine trimmed task vectors into one: a weighted sum, or of what agrees in sign."""

from collections.abc import Callable, Sequence

from merges.stages.floats import Array, like
from merges.stages.trim import Vectors
from merges.stages.weights import shares
from surgery.method import Tensor
from surgery.passes import Slices

Combined = Callable[[Slices], Tensor]
# A vote this close to a draw is one: beyond it, the order of a sum would decide.
DRAW = 2.0**-19
SMALLEST = 1e-8  # a sum of weights below this divides nothing
LEAST_COUNT = 256  # models that a byte cannot count


def summed(vectors: Vectors, weight: Sequence[float], *, normalize: bool) -> Combined:
    """Add task vectors up by their weights, which `normalize` divides by their sum.

    Shapes: slices of any shape to one of that shape, fresh.
    """
    parts = zip(shares(weight, normalize=normalize), vectors.factors, strict=True)
    scales = [share * factor for share, factor in parts]

    def combined(x: Slices) -> Tensor:
        first, *others = _times(vectors.slices(x), scales)
        for vector in others:
            first += vector
        result: Tensor = like(x, first)
        return result

    return combined


def agreed(
    vectors: Vectors,
    weight: Sequence[float],
    *,
    normalize: bool,
    elect: str = "weighted",
    divide: str = "weights",
) -> Combined:
    """Elect a sign for every element, and add up those task vectors that have it.

    Args:
        vectors: trimmed; zeros do not vote.
        weight: per model; a negative one votes for the other sign (if "weighted").
        normalize: divide by what was added up; a sum of weights of zero divides nothing.
        elect: whether signs vote by "weighted" values or by "raw" ones; a draw elects plus.
        divide: by the "weights" added up, or by their "count".
    """
    weights, factors = list(weight), vectors.factors
    counted = [1.0] * len(weights) if divide == "count" else weights
    if normalize and divide == "weights" and min(weights) == max(weights) >= SMALLEST:
        weights = counted = [1.0] * len(weights)  # they cancel
    before = [w * f for w, f in zip(weights, factors, strict=True)]
    after = [1.0] * len(weights)
    if elect == "raw":
        before, after = list(factors), weights

    def combined(x: Slices) -> Tensor:
        votes = _times(vectors.slices(x), before)
        result: Tensor = like(x, _of_one_sign(votes, after, counted if normalize else ()))
        return result

    return combined


def _times(vectors: list[Array], factors: Sequence[float]) -> list[Array]:
    """Multiply in place."""
    import numpy as np

    for vector, factor in zip(vectors, factors, strict=True):
        if factor != 1:
            np.multiply(vector, factor, out=vector)
    return vectors


def _of_one_sign(votes: list[Array], weights: Sequence[float], counted: Sequence[float]) -> Array:
    """Add up the votes for the elected sign, by weights; divide by what they count for, if told.

    With the elected sign taken out, they are the positive ones.
    """
    import numpy as np

    against, poison = elected(votes)
    for vote in votes:
        bits = vote.view(against.dtype)
        bits ^= against
    divisor = _divisor(votes, counted) if counted else None
    first, *others = _times([np.maximum(vote, 0, out=vote) for vote in votes], weights)
    for vote in others:
        first += vote
    if divisor is not None:
        first /= divisor
    if poison is not None:
        first += poison
    bits = first.view(against.dtype)
    bits ^= against
    return first


def _divisor(votes: Sequence[Array], counted: Sequence[float]) -> Array:
    """Return what the positive votes count for; one where that is next to nothing."""
    import numpy as np

    agree = [vote > 0 for vote in votes]
    if min(counted) == max(counted) == 1 and len(votes) < LEAST_COUNT:
        number = agree[0].view(np.uint8)
        for one in agree[1:]:
            number += one
        return np.maximum(number, 1, out=number)
    divisor = agree[0] * votes[0].dtype.type(counted[0])
    for one, share in zip(agree[1:], counted[1:], strict=True):
        divisor += one * divisor.dtype.type(share)
    divisor += np.abs(divisor) < SMALLEST
    return divisor


def elected(votes: Sequence[Array]) -> tuple[Array, Array | None]:
    """Return the elected signs, and NaN where a vote is not finite, if any is.

    Shapes: equal slices to the sign bit of each element, set for minus, alone in an integer;
    and, unless all votes are finite, zeros with NaN among them. A draw elects plus.
    """
    import numpy as np

    total, strength = votes[0].copy(), np.abs(votes[0])
    spare = np.empty_like(total)
    for vote in votes[1:]:
        total += vote
        strength += np.abs(vote, out=spare)
    strength *= DRAW
    total += strength  # is NaN or plus infinity where a vote is not finite
    unsound = not np.isfinite(total.max(initial=0))
    bits = total.view(f"u{total.itemsize}")
    poison = total * 0 if unsound else None
    bits &= bits.dtype.type(1 << 8 * total.itemsize - 1)
    return bits, poison
