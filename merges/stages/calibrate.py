"""Take back what a merged task vector counts more than once (singular value calibration)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from merges.stages.matrices import Held, Merged, Vectors, merged_matrices
from merges.stages.spectrum import DECOMPOSING, gram, spectrum, squares
from surgery.method import Tensor

Counted = Literal["paper", "code"]


def calibrated(
    vectors: Vectors,
    merged: Callable[[list[Tensor]], Tensor],
    models: int,
    *,
    alpha: float,
    factor: Counted,
    tolerance: float,
) -> Merged:
    """Return the function to the merged task vector with its singular values scaled down.

    Args:
        merged: from a block of the vectors the merged one's, which it may not share memory with.
        models: how many of the vectors, the first ones, are the tasks'.
        alpha: the least that a task may count for.
        factor: as the paper tells, or as the authors' code has it.
    """
    own = (merged(block) for block in vectors.blocks())
    values, right = spectrum(gram(own, vectors.width), tolerance)
    shares = _turned if vectors.turned else _straight
    counted = shares(vectors, merged, models, (values, right), tolerance)
    by = _paper(counted, alpha) if factor == "paper" else _code(counted, alpha)
    back = (right * by) @ right.T
    return lambda block: merged(block) @ back


def calibrated_after(
    base: Tensor,
    models: Sequence[Tensor],
    merged: Tensor,
    *,
    alpha: float = 0.1,
    factor: Counted = "paper",
    tolerance: float = 1e-5,
    rule: str = "svd",
) -> Iterator[Tensor]:
    """Yield the pieces of a merged tensor, made by any method, with its change calibrated.

    Shapes: all equal. What is merged by a rule other than "svd" stays as it is.
    """
    if rule != "svd":
        yield merged[...]
        return

    def last(vectors: Vectors) -> Merged:
        return calibrated(
            vectors,
            lambda block: block[-1],
            len(models),
            alpha=alpha,
            factor=factor,
            tolerance=tolerance,
        )

    weight = [1.0] * (len(models) + 1)
    yield from merged_matrices(base, [*models, merged], last, weight=weight, scale=1.0, rule=rule)


def _paper(counted: Tensor, alpha: float) -> Tensor:
    return counted.shape[0] / counted.clamp_min(alpha).sum(0)


def _code(counted: Tensor, alpha: float) -> Tensor:
    from torch import ones_like, where

    mean = counted.mean(0).clamp_min(alpha)
    return 1 / where((counted > 0).all(0), mean, ones_like(mean))


Spectrum = tuple[Tensor, Tensor]


def _straight(
    vectors: Vectors,
    merged: Callable[[list[Tensor]], Tensor],
    models: int,
    found: Spectrum,
    tolerance: float,
) -> Tensor:
    """Return how often each task's response is in the merged one, [models, rank].

    With rows the long side a response is u_r^T d = v_r^T (D^T d) / sigma_r.
    """
    import torch

    values, right = found
    rows = []
    for n in range(models):
        cross = torch.zeros(vectors.width, vectors.width, dtype=torch.float64)
        norm = 0.0
        for block in vectors.blocks():
            norm += float(block[n].square().sum())
            cross.addmm_(merged([d.clone() for d in block]).T, block[n])
        response = right.T @ cross
        inner = (response * right.T).sum(1)
        rows.append(_share(inner, response.square().sum(1) / values.square(), norm, tolerance))
    return torch.stack(rows)


def _turned(
    vectors: Vectors,
    merged: Callable[[list[Tensor]], Tensor],
    models: int,
    found: Spectrum,
    tolerance: float,
) -> Tensor:
    """Return the same where rows are the short side, whose vectors the right ones are."""
    import torch

    values, right = found
    inner, square = right.new_zeros(2, models, values.numel())
    norms = [0.0] * models
    for block in vectors.blocks():
        whole = merged([d.clone() for d in block]) @ right
        for n, delta in enumerate(block[:models]):
            norms[n] += float(delta.square().sum())
            response = delta @ right
            inner[n] += (whole * response).sum(0)
            square[n] += response.square_().sum(0)
    return torch.stack(
        [_share(i, s, norm, tolerance) for i, s, norm in zip(inner, square, norms, strict=True)]
    )


def _share(inner: Tensor, square: Tensor, norm: float, tolerance: float) -> Tensor:
    """Return inner / square, or zero for a response that is next to nothing in its task vector."""
    from torch import where

    known = square > norm * tolerance**2
    return where(known, inner, 0.0) / where(known, square, 1.0)


def calibrating(rows: int, columns: int, *_: object) -> Held:
    """Return what is held."""
    side = min(rows, columns)
    return Held(squares(DECOMPOSING + 0.3, side), squares(1, side))
