"""Parameter competition balancing."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from merges.stages.layers import added
from merges.stages.matrices import ONE, total
from merges.stages.parameters import Lambda, LinesAlpha, LinesBeta, Weight
from merges.stages.parameters import groups as stage_groups
from merges.stages.selection import largest_of_all, order_statistics
from surgery.method import Param, Place, Tensor, merge
from surgery.passes import Each, Passes, Slices

SMALLEST = 1e-12  # scores that sum to less divide nothing


def _groups(values: Mapping[str, Any]) -> tuple[str, ...]:
    lines = stage_groups({**values, "scope": "tensor"})
    return ("ends", "scores", *lines) if values.get("scope", "model") == "model" else lines


@merge(source="https://arxiv.org/abs/2410.02396", groups=_groups)
def pcb(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weight = ONE,
    lambda_: Lambda = 1.2,
    ratio: Annotated[float, Param("share of each task vector that competes", gt=0, le=1)] = 0.1,
    clamp: Annotated[
        float, Param("share of the magnitudes at each end that is clamped", ge=0, lt=0.5)
    ] = 1e-4,
    scope: Annotated[
        Literal["tensor", "model"], Param("what shares are of: each tensor, or all")
    ] = "model",
    lines_alpha: LinesAlpha = None,
    lines_beta: LinesBeta = None,
    place: Place,
) -> Passes:
    r"""Average task vectors by scores of how an element competes in its own and between tasks.

    $$W = W_0 + \lambda \frac{\sum_i s_i \odot \hat\Delta_i}{\sum_i s_i}, \quad
    s_i = \operatorname{norm}\big[\exp(T \operatorname{norm}(|\hat\Delta_i|)^2) \odot
    \tanh(\Delta_i \odot \textstyle\sum_j \Delta_j)\big]_{\text{top } \rho}$$

    norm maps the least to 0 and the largest to 1; of the scores the largest `ratio` count, the
    least of them and all others are 0; the hat clamps the magnitudes at both ends.

    Shapes: all equal, any.

    Deviations: a number of elements is a share rounded down, at least 1, where the authors' code
    is one or two ranks off. Where all magnitudes are equal their norm is 1 (the authors divide
    zero by zero); where the threshold is the largest score, what has that score counts 1; a task
    vector of zero takes no part.

    Source: "Parameter Competition Balancing for Model Merging", arXiv 2410.02396, section 3, and
    `PCB_merge` of the authors' code, whose scores of competition between tasks use the
    difference itself.
    """
    count, numel = len(models), base.numel()

    def sizes(x: Slices) -> list[Any]:
        found = [d.abs_().reshape(-1).numpy() for d in _weighed(x, weight)]
        return [*found, *(-size for size in found)]

    def scores(x: Slices) -> list[Any]:
        return [score.reshape(-1).numpy() for score in _scores(_weighed(x, weight), ends)]

    found = yield from _largest(sizes, [[clamp]] * (2 * count), numel, scope, "ends")
    ends = [
        _Range(-low, high) for (high,), (low,) in zip(found[:count], found[count:], strict=True)
    ]
    found = yield from _largest(scores, [[ratio, 0.0]] * count, numel, scope, "scores")
    tops = [
        _Range(low, high) if end.high else _Range(0.0, 1.0)
        for (low, high), end in zip(found, ends, strict=True)
    ]

    def combined(x: Slices) -> Tensor:
        deltas = _weighed(x, weight)
        pairs = zip(_scores(deltas, ends), tops, strict=True)
        shares = [top.share(score) for score, top in pairs]
        parts = [end.clamped(d).mul_(s) for d, end, s in zip(deltas, ends, shares, strict=True)]
        return total(parts).div_(total(shares).clamp_(min=SMALLEST))

    return (
        yield from added(
            combined, scale=lambda_, lines_alpha=lines_alpha, lines_beta=lines_beta, place=place
        )
    )


@dataclass(frozen=True, slots=True)
class _Range:
    """From the least number that counts to the largest."""

    low: float
    high: float

    def share(self, values: Tensor) -> Tensor:
        """Return where values lie in the range, 0 to 1; in a range of one number that is 1."""
        if self.low == self.high:
            found: Tensor = (values >= self.low).double()
            return found
        return (values.clamp(self.low, self.high) - self.low).div_(self.high - self.low)

    def clamped(self, delta: Tensor) -> Tensor:
        """Return a task vector with its magnitudes inside the range."""
        return delta.abs().clamp_(self.low, self.high).mul_(delta.sign())


def _weighed(x: Slices, weight: Sequence[float]) -> list[Tensor]:
    base = x.base.double()
    return [(model - base).mul_(w) for model, w in zip(x.models, weight, strict=True)]


def _scores(deltas: Sequence[Tensor], ends: Sequence[_Range]) -> list[Tensor]:
    whole = sum(deltas[1:], deltas[0])
    return [
        end.share(d.abs()).square_().mul_(len(deltas)).exp_().mul_((d * whole).tanh_())
        for d, end in zip(deltas, ends, strict=True)
    ]


def _largest(
    values: Callable[[Slices], list[Any]],
    shares: list[list[float]],
    numel: int,
    scope: str,
    group: str,
) -> Generator[Each, Any, list[list[float]]]:
    """Return per vector the least of its largest elements, each share of them at least one."""
    if scope == "model":
        cuts = yield from largest_of_all(values, shares, numel, group=group)
        return [[cut.value for cut in row] for row in cuts]
    ranks = [[numel - max(1, int(share * numel)) for share in row] for row in shares]
    return (yield from order_statistics(values, ranks, numel))
