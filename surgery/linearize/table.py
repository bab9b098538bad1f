"""What a linearization cost, row by row, beside the model and a window that nobody trained."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from surgery.evaluate.pairs import Progress
    from surgery.evaluate.results import ModelFigures

TEACHER, BASELINE, UNTRAINED = "teacher", "swa-sink", "untrained"
ABLATED = "no linear branch"
DRAWS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """How much of the bits per byte that lie between a row and the teacher is closed; 1 is all.

    Attributes:
        low, high: 95% interval over documents; None where they are too few.
    """

    share: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model of the table.

    Attributes:
        name: `teacher`, `swa-sink`, `untrained`, the stages in their order, `no linear branch`.
        bits_per_byte: on the held-out text.
        more: bits per byte beyond the teacher's; None for itself.
        low, high: 95% interval of that, paired over documents; None where they are too few.
        kl: mean of KL(teacher || model) in nats a token.
        agreement: share of tokens at which both rank the same token first.
        closed: by the name of a row without training, the share of its gap that is closed.
    """

    name: str
    bits_per_byte: float
    more: float | None = None
    low: float | None = None
    high: float | None = None
    kl: float | None = None
    agreement: float | None = None
    closed: Mapping[str, Share]


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """How a table is measured.

    Attributes:
        texts: files that nothing is trained on.
        context: tokens of a window; None for what the models take, at most 2048.
    """

    texts: tuple[Path, ...]
    context: int | None = None
    device: str = "cpu"
    seed: int = 0


def measure(
    teacher: str,
    models: Mapping[str, Path],
    held: Held,
    *,
    progress: "Progress | None" = None,
) -> tuple[Row, ...]:
    """Measure models beside their teacher on the same windows.

    Args:
        teacher: the model that was linearized.
        models: by the names of their rows.
        progress: called with a model's name, tokens fed, and tokens to feed.

    Raises:
        RecipeError, CheckpointError, TrainError: those of `surgery.evaluate.evaluate`.
    """
    from surgery.evaluate import evaluate

    found = evaluate(
        list(models.values()),
        held.texts,
        parent=teacher,
        context=held.context,
        device=held.device,
        bootstrap=DRAWS,
        seed=held.seed,
        progress=progress,
    )
    return tabulated(dict(zip((TEACHER, *models), found.models, strict=True)), seed=held.seed)


def tabulated(found: "Mapping[str, ModelFigures]", *, seed: int = 0) -> tuple[Row, ...]:
    """Return the rows of measured models, the teacher first."""
    return tuple(_row(name, found, seed) for name in found)


def as_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return what JSON holds."""
    return [asdict(row) for row in rows]


def from_dicts(told: Sequence[Mapping[str, Any]]) -> tuple[Row, ...]:
    """Return the rows that `as_dicts` told.

    Raises:
        RecipeError: they are none.
    """
    try:
        return tuple(
            Row(**{**row, "closed": {n: Share(**s) for n, s in row["closed"].items()}})
            for row in told
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise RecipeError("table", "is none of a linearization", "restore the record") from error


def _row(name: str, found: "Mapping[str, ModelFigures]", seed: int) -> Row:
    figures = found[name].overall
    bits = float(figures.bits_per_byte or 0.0)  # a text without a byte was refused
    if name == TEACHER:
        return Row(name=name, bits_per_byte=bits, closed={})
    difference, divergence = figures.difference, figures.divergence
    return Row(
        name=name,
        bits_per_byte=bits,
        more=None if difference is None else difference.bits_per_byte,
        low=None if difference is None else difference.low,
        high=None if difference is None else difference.high,
        kl=None if divergence is None else divergence.mean,
        agreement=None if divergence is None else divergence.agreement,
        closed=_closed(name, found, seed),
    )


def _closed(name: str, found: "Mapping[str, ModelFigures]", seed: int) -> dict[str, Share]:
    """Return the shares of the gaps of rows that were not trained; none where there is no gap."""
    starts = [s for s in (BASELINE, UNTRAINED) if s in found and s != name]
    shares = {s: _share(found[name], found[s], found[TEACHER], seed) for s in starts}
    return {start: share for start, share in shares.items() if share is not None}


def _share(
    model: "ModelFigures", start: "ModelFigures", teacher: "ModelFigures", seed: int
) -> Share | None:
    """Return how much of the way from one model to the teacher another has gone.

    The interval draws documents with replacement, the same ones for all three models.
    """
    import numpy as np

    from surgery.evaluate.statistics import FEWEST_DOCUMENTS, resampled_sums

    columns = np.concatenate([_costs(each) for each in (model, start, teacher)], axis=1)
    columns = columns[(columns[:, 1::2] > 0).all(axis=1)]
    share = _shares(columns.sum(0)[None])
    if not len(columns) or not np.isfinite(share[0]):
        return None
    if len(columns) < FEWEST_DOCUMENTS:
        return Share(share=float(share[0]), low=None, high=None)
    drawn = _shares(np.concatenate(resampled_sums(columns, draws=DRAWS, seed=seed)))
    if not np.isfinite(drawn).all():  # in some draws there is no gap at all
        return Share(share=float(share[0]), low=None, high=None)
    low, high = (float(x) for x in np.quantile(drawn, [0.025, 0.975]))
    return Share(share=float(share[0]), low=low, high=high)


def _costs(model: "ModelFigures") -> "npt.NDArray[np.float64]":
    """Shapes: [documents, 2], nats and bytes."""
    import numpy as np

    return np.array([(f.nats, f.bytes) for f in model.per_document], np.float64)


def _shares(sums: "npt.NDArray[np.float64]") -> "npt.NDArray[np.float64]":
    """Shapes: sums [draws, 6] of nats and bytes to [draws]; NaN where there is no gap."""
    import numpy as np

    model, start, teacher = (sums[:, i] / sums[:, i + 1] for i in (0, 2, 4))
    gap = start - teacher
    return np.where(gap > 0, (start - model) / np.where(gap > 0, gap, 1.0), np.nan)
