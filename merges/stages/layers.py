"""Scale a merged task vector by its place in the model (LiNeS), and add it to the base."""

from collections.abc import Generator
from typing import Any

from merges.stages.combine import Combined
from merges.stages.floats import array, deltas, sum_of
from surgery.method import Place, Tensor
from surgery.passes import Each, Passes, Slices


def added(
    combined: Combined,
    *,
    scale: float = 1.0,
    lines_alpha: float | None,
    lines_beta: float | None,
    place: Place,
) -> Passes:
    """Add the combined task vector to the base, scaled: the last stage.

    Where the vector is zero, the base stays what it is, even a negative zero.
    """
    alpha, beta = yield from _line(combined, lines_alpha, lines_beta)
    factor = -scale * (alpha + beta * (place.depth or 0.0))

    def last(x: Slices) -> Tensor:
        # Minus plus zero leaves -0.0 as it is; plus zero would not.
        change = combined(x)
        if factor != 1:
            change *= factor
        change += 0.0
        return x.base - change

    return last


def _line(
    combined: Combined, alpha: float | None, beta: float | None
) -> Generator[Each, Any, tuple[float, float]]:
    """Return the layer scale's start and slope over the depth.

    Neither given: no layer scale. Alpha alone: up to 1 in the last layer, as for one task.
    Beta alone: alpha by the rule for several tasks, the L1 norm of the task vectors' sum over
    that of the merged vector and their number, all of the whole model.

    Source: LiNeS, arXiv 2410.17146; the rule as in the authors' code.
    """
    if alpha is not None or beta is None:
        return given_line(alpha, beta)
    (plain, merged, models), _ = yield Each(
        lambda x: _norms(x, combined), group="lines", combine=_summed, fold=_plus
    )
    return (plain / merged / models if merged else 1.0 / models), beta


def given_line(alpha: float | None, beta: float | None) -> tuple[float, float]:
    """Return start and slope where nothing must be measured: not beta alone."""
    if alpha is None:
        return 1.0, 0.0
    return alpha, 1 - alpha if beta is None else beta


def _norms(x: Slices, combined: Combined) -> tuple[float, float, int]:
    """Return the L1 norms of the task vectors' plain sum and of the merged vector."""
    import numpy as np

    plain, *others = deltas(x)
    for vector in others:
        plain += vector
    merged = array(combined(x))
    return sum_of(np.abs(plain)), sum_of(np.abs(merged)), len(x.models)


def _plus(a: tuple[float, float, int], b: tuple[float, float, int]) -> tuple[float, float, int]:
    return a[0] + b[0], a[1] + b[1], a[2]


def _summed(tensors: list[list[tuple[float, float, int]]]) -> tuple[float, float, int]:
    from math import fsum

    found = [part for parts in tensors for part in parts]
    return fsum(f[0] for f in found), fsum(f[1] for f in found), found[0][2]
