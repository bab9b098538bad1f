"""Weights disentangled into magnitudes and directions of columns, and merged by their change."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from merges.stages.layers import added
from merges.stages.matrices import ONE, is_matrix
from merges.stages.parameters import Lambda, LinesAlpha, LinesBeta, Weight, groups
from surgery.method import Param, Place, Tensor, merge
from surgery.passes import Each, Passes, Slices
from surgery.passes import total as summed
from surgery.plan import Part

Array = Any  # a numpy array
Lines = dict[tuple[int, int], Array]  # by matrix and first line: sums of squares, [1 + 2 T, lines]


@merge(source="https://arxiv.org/abs/2408.03092", groups=groups)
def widen(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weight = ONE,
    lambda_: Lambda = 1.0,
    ratio: Annotated[
        float, Param("what changed more than this many times the mean is kept as it is", ge=0)
    ] = 1.0,
    calibration: Annotated[float, Param("score of what is kept as it is")] = 1.0,
    embeddings: Annotated[
        Literal["rows", "columns"], Param("what embeddings and heads are looked at by")
    ] = "rows",
    lines_alpha: LinesAlpha = None,
    lines_beta: LinesBeta = None,
    place: Place,
) -> Passes:
    r"""Add task vectors, each column by how much its length and direction changed among all.

    $$W = W_0 + \lambda \sum_i \Delta_i \operatorname{diag}\big(\tfrac12 S(r(|m_i - m_0|)) +
    \tfrac12 S(r(1 - \cos(c_i, c_0)))\big)$$

    m are the columns' lengths and c the columns. r ranks columns within a model, from 0 to 1; S
    is the softmax over models, replaced by `calibration` where r is above `ratio` times its
    mean. Vectors and convolutions take the magnitudes of their elements' change instead of r.

    Shapes: [rows, columns], rows being outputs; experts [experts, rows, columns] one by one.

    Deviations: heads are looked at by rows as embeddings are, token by token (the authors turn
    embeddings alone); a column of zeros counts as turned only where it was not zero before.
    The scores of an element do not sum to one, as in the authors' code.

    Source: "Extend Model Merging from Fine-Tuned to Pre-Trained Large Language Models via Weight
    Disentanglement", arXiv 2408.03092, section 3, and the authors' code.
    """
    del models  # every pass sees slices
    if is_matrix(base.shape):
        by_rows = place.vocabulary and embeddings == "rows"
        lines = _Lines((1, 1, *base.shape)[-3:], by_rows)
        (found,) = yield Each(lambda x: _squares(x, lines), fold=_together)
        scores = {number: _scores(sums, ratio, calibration) for number, sums in lines.joined(found)}

        def combined(x: Slices) -> Tensor:
            return _by_lines(x, lines, scores, weight)

    else:
        sums = yield from summed(lambda x: [float(d.abs().double().sum()) for d in x.deltas])
        means = [value / base.numel() for value in sums]

        def combined(x: Slices) -> Tensor:
            return _by_elements(x, means, ratio, calibration, weight)

    return (
        yield from added(
            combined, scale=lambda_, lines_alpha=lines_alpha, lines_beta=lines_beta, place=place
        )
    )


@dataclass(frozen=True, slots=True)
class _Lines:
    """The columns of matrices, or their rows.

    Attributes:
        shape: [matrices, rows, columns].
        by_rows: lines are rows.
    """

    shape: tuple[int, ...]
    by_rows: bool

    def pieces(self, part: Part) -> Iterator[tuple[int, int, slice]]:
        """Cut a part where a matrix ends: its number, first element in it, place in the part."""
        size = self.shape[1] * self.shape[2]
        at = part.start
        while at < part.start + part.count:
            number, first = divmod(at, size)
            end = min((number + 1) * size, part.start + part.count)
            yield number, first, slice(at - part.start, end - part.start)
            at = end

    def padded(self, flat: Tensor, first: int) -> Tensor:
        """Return elements as whole rows [rows, columns], zeros where they are not given."""
        before = first % self.shape[2]
        rows = -(-(before + flat.numel()) // self.shape[2])
        whole = flat.new_zeros(rows * self.shape[2])
        whole[before : before + flat.numel()] = flat
        return whole.view(rows, self.shape[2])

    def spread(self, lines: Tensor, first: int, count: int) -> Tensor:
        """Return each element's own number of `lines`, for a run of a matrix's elements."""
        before, start = first % self.shape[2], first // self.shape[2]
        rows = -(-(before + count) // self.shape[2])
        own = lines[start : start + rows, None] if self.by_rows else lines[None, :]
        return own.expand(rows, self.shape[2]).reshape(-1)[before : before + count]

    def joined(self, found: Lines) -> Iterator[tuple[int, Array]]:
        """Put together what was found of each matrix's lines."""
        import numpy as np

        for number in range(self.shape[0]):
            own = [(start, sums) for (n, start), sums in found.items() if n == number]
            whole = np.zeros((len(own[0][1]), self.shape[1 if self.by_rows else 2]))
            for start, sums in own:
                whole[:, start : start + sums.shape[1]] += sums
            yield number, whole


def _squares(x: Slices, lines: _Lines) -> Lines:
    """Return sums over lines of the squares of the base, of each model and of each change."""
    import numpy as np

    found = {}
    base = x.base.double()
    every = [base, *(model.double() for model in x.models)]
    every += [model - base for model in every[1:]]
    axis = 1 if lines.by_rows else 0
    for number, first, place in lines.pieces(x.part):
        wide = [lines.padded(tensor[place], first) for tensor in every]
        sums = np.stack([rows.square_().sum(axis).numpy() for rows in wide])
        found[number, first // lines.shape[2] if lines.by_rows else 0] = sums
    return found


def _together(one: Lines, other: Lines) -> Lines:
    for key, sums in other.items():
        if key in one:
            one[key] += sums
        else:
            one[key] = sums
    return one


def _scores(sums: Array, ratio: float, calibration: float) -> list[Tensor]:
    """Return a score for every line and model."""
    import numpy as np
    import torch

    models = len(sums) // 2
    squares, own, apart = sums[0], sums[1 : models + 1], sums[models + 1 :]
    before, after = np.sqrt(squares), np.sqrt(own)
    sizes, products = before + after, 2 * before * after
    # Both are exactly zero where nothing changed, which differences of lengths or 1 - cos are not.
    longer = np.divide(np.abs(own - squares), sizes, out=np.zeros_like(own), where=sizes > 0)
    turn = np.clip(apart - (after - before) ** 2, 0, None)
    turned = np.divide(turn, products, out=(turn > 0) * 1.0, where=products > 0)
    each = [_importance(_ranks(found), ratio, calibration) for found in (longer, turned)]
    return list(torch.from_numpy((each[0] + each[1]) / 2))


def _ranks(changes: Array) -> Array:
    """Rank lines within each model, from 0 on; equal ones by their place."""
    import numpy as np

    order = np.argsort(changes, axis=1, kind="stable")
    ranks = np.empty_like(changes)
    np.put_along_axis(ranks, order, 1.0 * np.arange(changes.shape[1]), axis=1)
    return ranks


def _importance(ranks: Array, ratio: float, calibration: float) -> Array:
    import numpy as np

    lines = ranks.shape[1]
    grown = np.exp(ranks / lines)
    kept = ranks > (lines - 1) / 2 * ratio  # of ranks, not of shares: the mean must be exact
    return np.where(kept, calibration, grown / grown.sum(axis=0))


def _by_lines(
    x: Slices, lines: _Lines, scores: dict[int, list[Tensor]], weight: Sequence[float]
) -> Tensor:
    from torch import empty, float64

    base = x.base.double()
    found = empty(x.part.count, dtype=float64)
    for number, first, place in lines.pieces(x.part):
        merged = found[place].zero_()
        for model, own, w in zip(x.models, scores[number], weight, strict=True):
            delta = model[place] - base[place]
            merged.addcmul_(delta, lines.spread(own, first, delta.numel()), value=w)
    return found


def _by_elements(
    x: Slices, means: Sequence[float], ratio: float, calibration: float, weight: Sequence[float]
) -> Tensor:
    from torch import stack

    base = x.base.double()
    deltas = stack([model - base for model in x.models])
    sizes = deltas.abs()
    scores = sizes.softmax(0)
    for score, size, delta, mean, w in zip(scores, sizes, deltas, means, weight, strict=True):
        score[size > mean * ratio] = calibration
        score.mul_(delta).mul_(w)
    return scores.sum(0)
