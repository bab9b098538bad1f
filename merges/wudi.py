"""Merge task vectors so that each disturbs the others' inputs least."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from merges.stages.matrices import (
    ONE,
    Embeddings,
    Held,
    Merged,
    Others,
    Tolerance,
    Vectors,
    check_lines,
    held_bytes,
    layered,
    merged_matrices,
    rule_of,
    total,
)
from merges.stages.parameters import Lambda, LinesAlpha, LinesBeta, Weight
from merges.stages.spectrum import DECOMPOSING, gram, spectrum, squares
from surgery.method import Param, Place, Tensor, merge

FIRST, SECOND, SMALL = 0.9, 0.999, 1e-8  # Adam's decays and epsilon, the authors' defaults


def _across(rows: int, columns: int, models: int, values: Mapping[str, Any]) -> bool:
    """Whether the task vectors' rows side by side span less than the columns."""
    return values["solver"] == "closed" and models * rows < columns


def _held(rows: int, columns: int, models: int, values: Mapping[str, Any]) -> Held:
    solving = 2.2 if values["ridge"] else DECOMPOSING  # Cholesky: the matrix and its root
    if _across(rows, columns, models, values):
        side, wanted = models * rows, 2 / models
        return Held(squares(solving + wanted, side), squares(1 / models, side))
    if values["solver"] == "adam":
        kept = squares(models + 1, columns)
        return Held(kept, kept + 6 * 8 * max(rows, columns))
    # The root, and copies of it and of what is solved for.
    return Held(squares(max(solving, 3.2) + models, columns), squares(models + 0.2, columns))


@merge(
    source="https://arxiv.org/abs/2503.08099",
    holds=held_bytes(_held, turned=_across),
    check=check_lines,
)
def wudi(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weight = ONE,
    lambda_: Lambda = 1.0,
    solver: Annotated[
        Literal["closed", "adam"], Param("the minimum itself, or the authors' steps towards it")
    ] = "closed",
    ridge: Annotated[
        float, Param("weight of staying near the sum; 0 is the minimum itself", ge=0)
    ] = 1.0,
    steps: Annotated[int, Param("of adam", ge=0)] = 300,
    rate: Annotated[float, Param("of adam's learning", gt=0)] = 1e-5,
    tolerance: Tolerance = 1e-5,
    others: Others = "mean",
    embeddings: Embeddings = "mean",
    lines_alpha: LinesAlpha = None,
    lines_beta: LinesBeta = None,
    place: Place,
) -> Iterator[Tensor]:
    r"""Find the task vector whose difference from each of the others' falls outside their rows.

    $$\min_t \sum_i \frac{\lVert (t - \Delta_i) \Delta_i^\top \rVert^2}{\lVert \Delta_i \rVert^2}
    + r \lVert t - S \rVert^2, \quad
    t = \Big(\sum_i \Delta_i C_i + r S\Big) \Big(\sum_i C_i + r\Big)^{-1}$$

    $$S = \sum_i \Delta_i, \quad C_i = \frac{\Delta_i^\top \Delta_i}{\lVert \Delta_i \rVert^2},
    \quad r = \rho \operatorname{mean} \lambda\Big(\sum_i C_i\Big)$$

    rho is `ridge`. With 0 it is the minimum of the paper's objective itself, of all minima the one
    of least norm.

    Shapes: [rows, columns], rows being outputs; experts [experts, rows, columns] one by one.

    Deviations: the closed form, and the ridge. The authors start at S and stop after 300 steps
    of Adam, which keeps directions that hardly count near S as the ridge does; the minimum itself
    lets them grow, and the models of this repository fared worse with it (decision 034). What is
    no matrix is averaged (the authors leave the base's, which `others` and `embeddings` can
    tell). Adam works in float64.

    Source: "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via
    Task Vectors", arXiv 2503.08099, section 4.3, equation 11.
    """

    def solved(vectors: Vectors) -> Merged:
        if solver == "adam":
            return _stepwise(vectors, steps, rate)
        by_side = _by_rows if vectors.turned else _by_columns
        return by_side(vectors, ridge, tolerance)

    rule = rule_of(base.shape, others=others, embeddings=embeddings, place=place)
    scale = layered(lambda_, lines_alpha=lines_alpha, lines_beta=lines_beta, place=place)
    return merged_matrices(
        base,
        models,
        solved,
        weight=weight,
        scale=scale,
        rule=rule,
        turned=lambda rows, columns, count: _across(rows, columns, count, {"solver": solver}),
    )


def _shares(vectors: Vectors) -> list[Tensor]:
    """Return the Gram matrices C_i [columns, columns]; zeros for a task vector of zero."""
    found = []
    for n in range(len(vectors.models)):
        own = gram((delta for (delta,) in vectors.blocks([n])), vectors.width)
        found.append(own.div_(float(own.trace()) or 1.0))
    return found


def _by_columns(vectors: Vectors, ridge: float, tolerance: float) -> Merged:
    parts = _shares(vectors)
    whole = sum(parts[1:], parts[0])
    stay = ridge * float(whole.trace()) / max(vectors.width, 1)
    for part in parts:
        part.diagonal().add_(stay)
    solve = _solver(whole, stay, tolerance)
    del whole
    for n, part in enumerate(parts):
        parts[n] = solve(part.T).T
    return lambda block: total([d @ part for d, part in zip(block, parts, strict=True)])


def _by_rows(vectors: Vectors, ridge: float, tolerance: float) -> Merged:
    """Solve for the rows of all task vectors, where those are fewer than columns.

    With B = [D_1 / n_1; ..; D_T / n_T] the sum of C_i is B^T B, and t = (L + r E) (B B^T + r)^-1 B,
    where L holds D_i D_i^T / n_i side by side, and E the norms n_i on diagonals.
    """
    from torch import cat

    norms = [sum(float(d.square().sum()) for d in column) ** 0.5 for column in _columns(vectors)]
    scales = [1 / norm if norm else 0.0 for norm in norms]
    size, count = vectors.width, len(vectors.models)

    def side_by_side(block: list[Tensor]) -> Tensor:
        return cat([d.mul_(s) for d, s in zip(block, scales, strict=True)], dim=1)

    own = gram((side_by_side(block) for block in vectors.blocks()), size * count)
    stay = ridge * float(own.trace()) / vectors.base.shape[1]
    places = [slice(n * size, (n + 1) * size) for n in range(count)]
    wanted = cat([own[at, at] * norm for at, norm in zip(places, norms, strict=True)])
    for at, norm in zip(places, norms, strict=True):
        wanted[at].diagonal().add_(stay * norm)
    solve = _solver(own, stay, tolerance)
    del own
    solution = solve(wanted)
    return lambda block: side_by_side(block) @ solution


def _solver(matrix: Tensor, stay: float, tolerance: float) -> Callable[[Tensor], Tensor]:
    """Return what multiplies by the inverse of matrix + stay, or the pseudo-inverse where 0.

    The matrix is overwritten.
    """
    import torch

    if stay > 0:
        matrix.diagonal().add_(stay)
        # With more than its mean eigenvalue over its size on the diagonal it is well-conditioned.
        half, _ = torch.linalg.cholesky_ex(matrix)
        return lambda right: torch.cholesky_solve(right, half)
    values, vectors = spectrum(matrix, tolerance)
    return lambda right: (vectors / values.square()) @ (vectors.T @ right)


def _columns(vectors: Vectors) -> Iterator[Iterator[Tensor]]:
    for n in range(len(vectors.models)):
        yield (delta for (delta,) in vectors.blocks([n]))


def _stepwise(vectors: Vectors, steps: int, rate: float) -> Merged:
    """Return Adam's way from the sum of the task vectors, which no row shares with another."""
    parts = _shares(vectors)
    whole = sum(parts[1:], parts[0])

    def descended(block: list[Tensor]) -> Tensor:
        target = total([d @ part for d, part in zip(block, parts, strict=True)])
        found = total(block)
        mean, square = found * 0, found * 0
        for step in range(1, steps + 1):
            slope = (found @ whole).sub_(target).mul_(2)
            mean.mul_(FIRST).add_(slope, alpha=1 - FIRST)
            square.mul_(SECOND).addcmul_(slope, slope, value=1 - SECOND)
            size = (square / (1 - SECOND**step)).sqrt_().add_(SMALL)
            found.addcdiv_(mean, size, value=-rate / (1 - FIRST**step))
        return found

    return descended
