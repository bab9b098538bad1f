"""TIES in a basis that the task vectors share."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

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
)
from merges.stages.parameters import Lambda, LinesAlpha, LinesBeta, Weight
from merges.stages.selection import LIMIT, Cut, largest
from merges.stages.sketch import leading, leading_bytes
from merges.stages.spectrum import DECOMPOSING, gram, spectrum, squares
from surgery.method import Param, Place, Tensor, merge
from surgery.passes import Each
from surgery.plan import Part

SAMPLE = 128  # rows of the blocks' longer side that guess where the trimmed magnitudes end


def _held(rows: int, columns: int, models: int, values: Mapping[str, Any]) -> Held:
    rank = values["rank"]
    kept = 8 * rows * (rows if rank is None else rank)
    finding = squares(DECOMPOSING, rows)
    if rank is not None:
        finding = leading_bytes((models * columns, rows), rank)
    selecting = models * 8 * min(LIMIT, columns * rows)  # what lies in brackets
    return Held(max(finding, kept + selecting), kept)


@merge(
    source="https://arxiv.org/abs/2410.19735",
    holds=held_bytes(_held, turned=lambda *_: True),
    check=check_lines,
)
def knots_ties(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weight = ONE,
    lambda_: Lambda = 0.6,
    density: Annotated[
        float, Param("fraction of each task vector kept in the shared basis", gt=0, le=1)
    ] = 0.2,
    rank: Annotated[
        int | None, Param("of the shared basis, then found by a randomised sketch", ge=1)
    ] = None,
    tolerance: Tolerance = 1e-5,
    others: Others = "mean",
    embeddings: Embeddings = "mean",
    lines_alpha: LinesAlpha = None,
    lines_beta: LinesBeta = None,
    place: Place,
) -> Iterator[Tensor]:
    r"""Turn the task vectors into a basis that they share, merge there by TIES, and turn back.

    $$W = W_0 + \lambda\,U \operatorname{TIES}(U^\top \Delta_1, \ldots, U^\top \Delta_T), \quad
    [\Delta_1 \cdots \Delta_T] = U \Sigma [V_1 \cdots V_T]$$

    TIES keeps the largest magnitudes of each, elects signs by the sum, and takes the mean of
    what agrees and is not zero.

    Shapes: [rows, columns], rows being outputs; experts [experts, rows, columns] one by one.
    Made for task vectors of low rank: with `rank` memory is in proportion to it, without it to
    the square of the rows.

    Deviations: magnitudes are compared within each tensor, the authors compare them through the
    whole model; singular values are cut by their share of the largest, not at 1e-5; where the
    sum is zero nothing is elected, for the signs of a basis are arbitrary. What is no matrix is
    averaged (the authors leave the base's unless told).

    Source: "Model merging with SVD to tie the Knots", arXiv 2410.19735, section 4, equations
    3 to 5.
    """

    def tied(vectors: Vectors) -> Merged:
        if rank is None:
            every = (delta for block in vectors.blocks() for delta in block)
            _, basis = spectrum(gram(every, vectors.width), tolerance)
        else:
            _, basis = leading(
                lambda: (delta for block in vectors.blocks() for delta in block),
                (len(models) * vectors.base.shape[1], vectors.width),
                rank,
                tolerance=tolerance,
                place=place,
            )
        least = _thresholds(vectors, basis, density)
        return lambda block: _ties([d @ basis for d in block], least) @ basis.T

    rule = rule_of(base.shape, others=others, embeddings=embeddings, place=place)
    scale = layered(lambda_, lines_alpha=lines_alpha, lines_beta=lines_beta, place=place)
    return merged_matrices(
        base, models, tied, weight=weight, scale=scale, rule=rule, turned=lambda *_: True
    )


def _ties(coordinates: list[Tensor], least: Sequence[float]) -> Tensor:
    from torch import zeros_like

    kept = [c.mul_(c.abs() >= low) for c, low in zip(coordinates, least, strict=True)]
    elected = sum(kept[1:], kept[0]).sign()
    total, count = zeros_like(elected), zeros_like(elected)
    for one in kept:
        agrees = one * elected > 0
        total += one * agrees
        count += agrees
    return total / count.clamp_min_(1)


@dataclass(frozen=True, slots=True)
class _Slices:
    """Coordinates of all task vectors in the basis, [rows of a block, rank]."""

    coordinates: list[Tensor]
    part: Part


def _thresholds(vectors: Vectors, basis: Tensor, density: float) -> list[float]:
    """Return the least magnitude that is kept, per task vector."""
    models, rank = len(vectors.models), basis.shape[1]
    numel = max(vectors.base.shape[1] * rank, 1)
    counts = [[max(1, int(density * numel))]] * models

    def values(x: Any) -> list[Any]:  # noqa: ANN401 - numpy's
        return [c.abs().reshape(-1).numpy() for c in x.coordinates]

    asking = largest(values, counts, numel)
    cuts = _answered(asking, vectors, basis) if rank else [[Cut(0.0)]] * models
    return [cut.value for (cut,) in cuts]


def _answered(
    asking: Generator[Each, Any, list[list[Cut]]], vectors: Vectors, basis: Tensor
) -> list[list[Cut]]:
    """Read the blocks as often as the selection asks."""
    answer = None
    while True:
        try:
            each = asking.send(answer)
        except StopIteration as stop:
            found: list[list[Cut]] = stop.value
            return found
        ask: Callable[[Any], Any] = each.fn
        if each.sample:
            answer = [ask(_sampled(vectors, basis))]
        else:
            answer = [ask(_turned(vectors, basis, *at)) for at in vectors.places()]


def _turned(vectors: Vectors, basis: Tensor, start: int, end: int) -> _Slices:
    rank = basis.shape[1]
    part = Part(0, start * rank, (end - start) * rank)
    return _Slices([d @ basis for d in vectors.block(start, end)], part)


def _sampled(vectors: Vectors, basis: Tensor) -> _Slices:
    from torch import cat

    places = vectors.places()
    rows = -(-SAMPLE // len(places)) if places else 0
    few = [vectors.block(start, min(start + rows, end)) for start, end in places]
    # Block by block: another shape might be multiplied with other rounding than later on.
    turned = [[d @ basis for d in block] for block in few]
    every = [cat(column) for column in zip(*turned, strict=True)]
    return _Slices(every, Part(0, 0, every[0].numel()))
