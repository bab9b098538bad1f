"""SCE: select what varies, calculate weights, erase what disagrees."""

from collections.abc import Generator, Sequence
from itertools import combinations
from math import prod
from typing import Annotated, Any

from merges.stages.combine import agreed
from merges.stages.floats import Array, array, deltas
from merges.stages.layers import added
from merges.stages.parameters import LinesAlpha, LinesBeta, groups
from merges.stages.selection import ALL, NONE, Cut, largest
from merges.stages.trim import Vectors, masked
from surgery.method import Param, Place, Tensor, merge
from surgery.passes import Each, Passes, Slices, dots, total


@merge(source="https://arxiv.org/abs/2408.07990", plain=True, ignored=("int8_mask",), groups=groups)
def sce(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    select_topk: Annotated[
        float, Param("fraction of the elements that differ between models to keep", ge=0, le=1)
    ] = 1.0,
    lines_alpha: LinesAlpha = None,
    lines_beta: LinesBeta = None,
    place: Place,
) -> Passes:
    r"""Keep what varies most between models, weight each by its energy, merge what agrees in sign.

    $$W = W_0 + \frac{\sum_{i \in A} w_i \tau_i}{\sum_{i \in A} w_i}, \quad
    w_i = \frac{\sum \tau_i^2}{\sum_j \sum \tau_j^2}, \quad
    A = \{i : \mathrm{sign}\,\tau_i = \mathrm{sign} \sum_j \tau_j\}$$

    Shapes: all equal, any; weights are per tensor, of what was selected. The elements kept are
    the `select_topk` of largest variance among those whose variance is not zero, the number
    rounded down, the lower index first where variances are equal. A draw elects plus.

    Source: "FuseChat", arXiv 2408.07990, section 3.3.
    """
    numel, count = prod(base.shape), len(models)
    chosen = ALL if select_topk >= 1 else (yield from _most_varied(select_topk, numel))
    vectors = Vectors(lambda x: _selected(x, chosen), (1.0,) * count)
    energies = yield from total(lambda x: [dots([v])[0] for v in vectors.slices(x)])
    weight = [energy / sum(energies) if sum(energies) else 1.0 for energy in energies]
    combined = agreed(vectors, weight, normalize=True, elect="raw")
    return (yield from added(combined, lines_alpha=lines_alpha, lines_beta=lines_beta, place=place))


def _most_varied(share: float, numel: int) -> Generator[Each, Any, Cut]:
    import numpy as np

    (varied,) = yield from total(lambda x: [float(np.count_nonzero(variation(x)))])
    kept = int(share * varied)
    if not kept:
        return NONE
    ((cut,),) = yield from largest(lambda x: [variation(x)], [[kept]], numel)
    return cut


def variation(x: Slices) -> Array:
    """Return what orders elements as their variance over the models does, and is exact for ties.

    Shapes: slices to a numpy array of their shape: the sum of squared differences of all pairs,
    of one pair the difference itself.
    """
    import numpy as np

    models = [array(model) for model in x.models]
    if len(models) == 2:  # noqa: PLR2004 - a pair
        apart = models[0] - models[1]
        return np.abs(apart, out=apart)
    result = np.zeros(models[0].shape)
    for one, other in combinations(models, 2):
        apart = (one - other).astype(np.float64)
        apart *= apart
        result += apart
    return result


def _selected(x: Slices, cut: Cut) -> list[Array]:
    if cut is ALL:
        return deltas(x)
    mask = cut.keep(variation(x), x.part)
    return [masked(delta, mask) for delta in deltas(x)]
