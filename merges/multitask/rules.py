"""How many task vectors become one, and which of its weights are each task's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from merges.stages.localized import added_up, localized
from surgery.method import Tensor

Masks = list[Tensor]  # of 0 and 1, one per task


@dataclass(frozen=True, slots=True)
class Shared:
    """What one set of weights keeps of several task vectors.

    Attributes:
        vector: the one task vector for all.
        masks: per task 1 where the vector's weight is its.
    """

    vector: Tensor
    masks: Masks


Rule = Callable[[Sequence[Tensor]], Shared]


def emr(deltas: Sequence[Tensor]) -> Shared:
    r"""Elect a sign for every weight, and keep the largest change that has it.

    $$\tau = s \odot \max_i |\tau_i|\,[\tau_i s > 0], \quad s = \mathrm{sign} \sum_i \tau_i,
    \quad m_i = [\tau_i \tau > 0]$$

    Shapes: equal, any. A sum of zero elects minus, as in the authors' code.

    Source: "EMR-Merging", arXiv 2405.17461, section 3.2.
    """
    import torch

    sign = added_up(deltas).gt_(0).mul_(2).sub_(1)
    best = torch.zeros_like(sign)
    masks = []
    for delta in deltas:
        along = delta * sign
        masks.append(along.gt(0).to(along.dtype))
        best = torch.maximum(best, along)
    return Shared(best.mul_(sign), masks)


def tall(deltas: Sequence[Tensor], bounds: Sequence[float]) -> Shared:
    r"""Add the task vectors up; a weight is a task's where it makes up enough of the sum.

    $$\tau = \sum_i \tau_i, \quad m_i = [\,|\tau_i| > \lambda_i |\tau - \tau_i|\,]$$

    Shapes: equal, any.

    Source: "Localizing Task Information for Improved Model Merging and Compression", arXiv
    2405.07813, equation 5; strict, as in the authors' code.
    """
    total = added_up(deltas)
    masks = [localized(d, total, bound) for d, bound in zip(deltas, bounds, strict=True)]
    return Shared(total, masks)


def rule_of(kind: str, bounds: Sequence[float]) -> Rule:
    """Return the rule of that name."""
    return emr if kind == "emr" else lambda deltas: tall(deltas, bounds)


def sums(deltas: Sequence[Tensor], shared: Shared) -> list[tuple[float, float, float]]:
    """Return per task: sum of |own vector|, of |shared vector in its mask|, weights in it."""
    found: list[tuple[float, float, float]] = []
    magnitude: Any = shared.vector.abs()
    for delta, mask in zip(deltas, shared.masks, strict=True):
        own, kept = delta.abs().double().sum(), (magnitude * mask).double().sum()
        found.append((float(own), float(kept), float(mask.double().sum())))
    return found
