"""Model stock: how far to go from the base to the average, by the angle between fine-tunes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from merges.stages.blend import blend
from merges.stages.sphere import cosines, gram, gram_along
from surgery.method import Param, Tensor, merge
from surgery.passes import Each, Passes, Slices
from surgery.plan import Tell

if TYPE_CHECKING:
    from merges.stages.sphere import Array

SINGULAR = 1e-6  # a smaller denominator gives no estimate


@merge(
    source="https://arxiv.org/abs/2403.19522",
    least=2,
    rows=lambda values: values["filter_wise"],
    plain=lambda values: not values["filter_wise"],
    tells=("t", "t_min", "t_max"),
)
def model_stock(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    filter_wise: Annotated[bool, Param("a ratio for every row instead of every tensor")] = False,
    average: Annotated[
        Literal["cosine", "angle"], Param("what is averaged over the pairs of models")
    ] = "cosine",
    clamp_t: Annotated[bool, Param("hold the ratio within [0, 1]")] = False,
) -> Passes:
    r"""Interpolate between the base and the average of fine-tuned models.

    $$W = t\,\bar W + (1 - t)\,W_0, \quad t = \frac{k \cos\theta}{1 + (k-1)\cos\theta}$$

    with k models, their average $\bar W$, and $\theta$ the angle between their task vectors
    $W_i - W_0$, of more than two the mean over all pairs: of cosines or, with `average` angle, of
    angles. A vector of length 0 counts as perpendicular to all. $t = 0$ where the denominator is
    below 1e-6. Negative cosines give $t < 0$, and a denominator near 0 a large $t$, unless
    `clamp_t`. The record tells $t$ of every tensor; with `filter_wise` the mean over its rows, the
    least and the largest.

    Shapes: equal, any. With `filter_wise`, of vectors along the last axis; a tensor of one axis
    is one vector.

    Source: Model Stock, arXiv 2403.19522, its ratio for N models; its layers are tensors here.
    mergekit 0.1.5 averages cosines and takes products of lengths below 1e-6 for 1e-6, which
    lowers t of tensors that hardly changed; FusionBench averages angles.
    """
    count, width = len(models), base.shape[-1] if base.ndim else 1

    def ratio(dots: "Array") -> "Array":
        return _ratio(_cosine(dots, average), count, clamp_t)

    if not filter_wise:
        t = float(ratio((yield from gram(lambda x: x.deltas, count))))
        yield Tell(t=t)
        return lambda x: _moved(x, t / count)
    rows = yield Each(lambda x: ratio(gram_along(_rows(x, width), 1)))
    yield _told(rows)
    return lambda x: _by_row(x, width, rows[x.part.index])


def _moved(x: Slices, factor: float) -> Tensor:
    result, *others = x.deltas
    for delta in others:
        result += delta
    result *= factor
    result += x.base
    return result


def _cosine(dots: "Array", average: str) -> "Array":
    """Return the mean over all pairs; [...] of dots [models, models, ...]."""
    import numpy as np

    pairs = cosines(dots)[np.triu_indices(len(dots), 1)]
    found: Array = np.cos(np.arccos(pairs).mean(0)) if average == "angle" else pairs.mean(0)
    return found


def _ratio(cosine: "Array", count: int, clamp: bool) -> "Array":
    import numpy as np

    under = 1 + (count - 1) * cosine
    singular = np.abs(under) < SINGULAR
    found = np.where(singular, 0.0, count * cosine / np.where(singular, 1.0, under))
    return np.clip(found, 0.0, 1.0) if clamp else found


def _told(rows: Sequence["Array"]) -> Tell:
    import numpy as np

    every = np.concatenate(rows)
    return Tell(t=every.mean(), t_min=every.min(), t_max=every.max())


def _rows(x: Slices, width: int) -> list[Tensor]:
    return [delta.reshape(-1, width) for delta in x.deltas]


def _by_row(x: Slices, width: int, ratios: "Array") -> Tensor:
    import torch

    deltas = _rows(x, width)
    mean = blend(deltas, [1 / len(deltas)] * len(deltas))
    factors = torch.from_numpy(ratios).to(mean.dtype)[:, None]
    return mean.mul_(factors).reshape(x.base.shape).add_(x.base)
