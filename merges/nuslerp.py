"""Spherical interpolation by weights, of models or of their task vectors."""

from collections.abc import Sequence
from operator import add
from typing import TYPE_CHECKING, Annotated, Any

from merges.stages.sphere import arc, gram, gram_along, vectors
from surgery.method import Param, PerModel, Tensor, merge
from surgery.passes import Each, Passes, Slices

if TYPE_CHECKING:
    from merges.stages.sphere import Array

SMALLEST = 1e-6  # weights whose sum is nearer to zero share equally


@merge(
    source="https://github.com/arcee-ai/mergekit",
    rows=lambda values: not values["nuslerp_flatten"],
)
def nuslerp(
    base: Tensor | None,
    first: Tensor,
    second: Tensor,
    *,
    weight: Annotated[PerModel[float], Param("share of each model")],
    nuslerp_flatten: Annotated[bool, Param("take a tensor for one vector")] = True,
    nuslerp_row_wise: Annotated[bool, Param("unflattened: vectors along the first axis")] = False,
) -> Passes:
    r"""Interpolate along the great circle between two models, or between their task vectors.

    $$v = \frac{\sin((1-t)\theta)\,v_1 + \sin(t\theta)\,v_2}{\sin\theta}, \quad
    \cos\theta = \langle u_1, u_2 \rangle, \quad t = \frac{w_2}{w_1 + w_2}$$

    With a base, $v_i = W_i - W_0$ and $W = W_0 + v$; without, $v_i = W_i$ and $W = v$; $u_i$ is
    the direction of $v_i$. $t = 1/2$ where the weights sum to zero.

    Shapes: equal, any. A tensor is one vector. With `nuslerp_flatten` false there is one for each
    position on the axes before the last (a row of a matrix); with `nuslerp_row_wise` besides, one
    for each position on the axes behind the first (a column: the name is the peer's). A tensor
    of one axis is always one vector.

    Source: mergekit 0.1.5; there is no paper. Differs where two vectors are parallel or opposed
    (sine below 1e-4): here they are interpolated linearly, there the test for it never fires in
    single precision and opposed vectors give noise. The direction of a zero vector counts as
    perpendicular to the other in both.
    """
    del base, second  # shapes only; slices know whether there is a base
    t = _second_share(weight)
    if nuslerp_flatten or first.ndim <= 1:
        whole = arc((yield from gram(vectors, 2)), t)
        return lambda x: _joined(x, vectors(x), whole)
    if nuslerp_row_wise:
        found = yield Each(lambda x: gram_along(vectors(x), 0), fold=add)
        columns = arc(found[0], t)
        return lambda x: _joined(x, vectors(x), columns)
    return lambda x: _by_row(x, first.shape[-1], t)


def _second_share(weight: Sequence[float]) -> float:
    total = sum(weight)
    return 0.5 if abs(total) < SMALLEST else weight[1] / total


def _by_row(x: Slices, width: int, t: float) -> Tensor:
    rows = [vector.reshape(-1, width) for vector in vectors(x)]
    factors = arc(gram_along(rows, 1), t)
    return _joined(x, rows, [factor[:, None] for factor in factors])


def _joined(x: Slices, pair: Sequence[Tensor], factors: Sequence["Array"]) -> Tensor:
    first, second = (_factor(factor, pair[0]) for factor in factors)
    mixed: Tensor = (pair[0] * first).add_(pair[1] * second).reshape(x.models[0].shape)
    return mixed.add(x.base) if x.has_base else mixed


def _factor(value: "Array", like: Tensor) -> Any:  # noqa: ANN401 - a number, or a tensor of them
    import torch

    return torch.from_numpy(value).to(like.dtype) if value.ndim else float(value)
