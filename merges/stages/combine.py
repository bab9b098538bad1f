"""Combine trimmed task vectors into one: a weighted sum, or of what agrees in sign."""

from collections.abc import Callable, Sequence

from merges.stages.trim import Vectors
from merges.stages.weights import shares
from surgery.method import Tensor
from surgery.passes import Slices

Combined = Callable[[Slices], Tensor]
# A vote this close to a draw is one: beyond it, the order of a sum would decide.
DRAW = 2.0**-19
SMALLEST = 1e-8  # a sum of weights below this divides nothing


def summed(vectors: Vectors, weight: Sequence[float], *, normalize: bool) -> Combined:
    """Add task vectors up by their weights, which `normalize` divides by their sum.

    Shapes: slices of any shape to one of that shape, fresh.
    """
    parts = zip(shares(weight, normalize=normalize), vectors.factors, strict=True)
    scales = [share * factor for share, factor in parts]

    def combined(x: Slices) -> Tensor:
        first, *others = vectors.slices(x)
        result = first.mul_(scales[0])
        for vector, scale in zip(others, scales[1:], strict=True):
            result.add_(vector, alpha=scale)
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
    scales = [share * factor for share, factor in zip(weight, vectors.factors, strict=True)]
    counted = [1.0] * len(weight) if divide == "count" else list(weight)

    def combined(x: Slices) -> Tensor:
        raw = vectors.slices(x)
        if elect == "weighted":
            terms = votes = _times(raw, scales)
        else:
            terms = _times([vector.clone() for vector in raw], scales)
            votes = _times(raw, vectors.factors)
        return _of_one_sign(terms, votes, counted if normalize else ())

    return combined


def _times(vectors: list[Tensor], factors: Sequence[float]) -> list[Tensor]:
    """Multiply in place."""
    pairs = zip(vectors, factors, strict=True)
    return [vector if factor == 1 else vector.mul_(factor) for vector, factor in pairs]


def _of_one_sign(terms: list[Tensor], votes: list[Tensor], shares: Sequence[float]) -> Tensor:
    """Add up the terms whose vote has the elected sign; divide by their shares, where given."""
    import torch

    sign, agrees = elected(votes)
    divisor = torch.zeros_like(sign) if shares else sign
    for number, (vote, term) in enumerate(zip(votes, terms, strict=True)):
        torch.mul(vote, sign, out=agrees).gt_(0)
        term.mul_(agrees)
        if shares:
            divisor.add_(agrees, alpha=shares[number])
        if number:
            terms[0].add_(term)
    if shares:
        small = torch.abs(divisor, out=agrees).lt_(SMALLEST)
        terms[0].div_(divisor.add_(small))
    return terms[0]


def elected(votes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the sign of the sum of votes, 1 or -1, 1 for a draw; and a tensor to write to.

    Shapes: equal slices to two of their shape.
    """
    import torch

    total, spare = votes[0].clone(), votes[0].abs()
    strength = spare.clone()
    for vote in votes[1:]:
        total.add_(vote)
        strength.add_(torch.abs(vote, out=spare))
    return total.add_(strength, alpha=DRAW).ge_(0).mul_(2).sub_(1), spare
