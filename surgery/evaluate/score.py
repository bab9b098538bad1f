"""What each scored token of each document costs a model, beside a reference or alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from surgery.errors import TrainError
from surgery.evaluate.forward import check_causal, costs, logits_of
from surgery.evaluate.load import Loaded, first_line
from surgery.evaluate.rows import Batch, fill, plan_rows
from surgery.evaluate.tokens import Encoded

if TYPE_CHECKING:
    import torch

Floats = npt.NDArray[np.float32]

# Raw logits of one batch, all models together; one row's logits are the floor.
_LOGIT_BYTES = 1 << 30
# What `costs` returns for two models.
_LINES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """One document; all arrays have shape [scored tokens], in nats.

    Attributes:
        nats: Negative log-likelihood under the model.
        reference_nats: The same under the reference, or None without one.
        divergence: KL(reference || model) over the vocabulary, or None.
        agreement: 1 where both rank the same token first, else 0, or None.
        squares: Mean over the vocabulary of the squared difference of the logits, or None.
    """

    nats: Floats
    reference_nats: Floats | None = None
    divergence: Floats | None = None
    agreement: Floats | None = None
    squares: Floats | None = None

    def of_reference(self) -> "Scores":
        """Return what the document costs the reference; only for scores beside one."""
        if self.reference_nats is None:
            raise ValueError("scored without a reference")
        return Scores(nats=self.reference_nats)


def score(
    model: Loaded,
    encoded: Sequence[Encoded],
    *,
    names: Sequence[str],
    context: int,
    stride: int,
    batch_tokens: int,
    reference: Loaded | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Scores]:
    """Score every document, and compare with a reference token by token if there is one.

    Progress is told the tokens fed so far and the tokens to feed in all.

    Raises:
        TrainError: A token has no embedding, a logit is not finite, a model reads ahead, or the
            forward pass fails.
    """
    models = (model,) if reference is None else (reference, model)
    for each in models:
        _check_ids(each, encoded, names)
        check_causal(each)
    room = _LOGIT_BYTES // (4 * model.vocabulary * len(models))
    plan = plan_rows(
        encoded, context=context, stride=stride, batch_tokens=min(batch_tokens, max(1, room))
    )
    lines = [
        np.zeros((1 if reference is None else _LINES, len(e.ids)), np.float32) for e in encoded
    ]
    fed, total = 0, sum(row.window.width for rows in plan for row in rows)
    for rows in plan:
        _run(models, fill(rows, encoded), names=names, into=lines)
        fed += sum(row.window.width for row in rows)
        if progress is not None:
            progress(fed, total)
    return [_scores(line[:, e.given :]) for line, e in zip(lines, encoded, strict=True)]


def _run(
    models: Sequence[Loaded], batch: Batch, *, names: Sequence[str], into: Sequence[Floats]
) -> None:
    """Score one batch and lay its values where its tokens are."""
    values = _values(models, batch)
    at = 0
    for row in batch.rows:
        window = row.window
        part = values[:, at : (at := at + window.end - window.score_from)]
        _check_finite(models, part, names[row.document])
        into[row.document][:, window.score_from : window.end] = part


def _values(models: Sequence[Loaded], batch: Batch) -> Floats:
    import torch

    device = models[0].device
    first = int(batch.position_n.min())
    keep = batch.ids_bt.shape[1] - first
    ids_bt, mask_bt = _tensor(batch.ids_bt, device), None
    if batch.mask_bt is not None:
        mask_bt = _tensor(batch.mask_bt, device)
    with torch.inference_mode():
        logits = [logits_of(each, ids_bt, mask_bt, keep=keep) for each in models]
        where = (batch.row_n, batch.position_n - first, batch.target_n)
        try:
            values: Floats = costs(logits, *(_tensor(x, device) for x in where)).cpu().numpy()
        except RuntimeError as error:
            fact = f"the logits cannot be compared ({first_line(error)})"
            raise TrainError(models[-1].path, fact, "lower --batch-tokens or --context") from error
    return values


def _tensor(array: npt.NDArray[np.int64], device: "torch.device") -> "torch.Tensor":
    import torch

    return torch.from_numpy(array).to(device)


def _check_ids(model: Loaded, encoded: Sequence[Encoded], names: Sequence[str]) -> None:
    for e, name in zip(encoded, names, strict=True):
        highest = int(e.ids.max(initial=0))
        if highest >= model.embeddings:
            fact = f"token {highest} of {name} has no embedding, there are {model.embeddings}"
            raise TrainError(model.path, fact, "use the tokenizer that belongs to the model")


def _check_finite(models: Sequence[Loaded], part: Floats, name: str) -> None:
    for model, nats in zip(models, part, strict=False):
        if not np.isfinite(nats).all():
            fact = f"its logits are not finite on {name}"
            raise TrainError(model.path, fact, "look for NaN with `surgery verify`")


def _scores(lines: Floats) -> Scores:
    if len(lines) == 1:
        return Scores(nats=lines[0])
    reference, nats, divergence, agreement, squares = lines
    return Scores(
        nats=nats,
        reference_nats=reference,
        divergence=divergence,
        agreement=agreement,
        squares=squares,
    )
