"""Logits of a model, and what they say about each scored token.

Axis letters: b rows of a batch, t tokens of a row, k last positions kept, v vocabulary, n scored
tokens, c scored tokens of one chunk.
"""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

from surgery.errors import TrainError
from surgery.evaluate.load import Loaded, first_line

if TYPE_CHECKING:
    import torch

# Bytes of float32 held at once for one log-softmax; a comparison holds about six such.
_CHUNK_BYTES = 64 << 20


def logits_of(
    loaded: Loaded, ids_bt: "torch.Tensor", mask_bt: "torch.Tensor | None", *, keep: int
) -> "torch.Tensor":
    """Return the logits of the last `keep` positions, shape [b, keep, v].

    Raises:
        TrainError: The forward pass fails, for want of memory or any other reason.
    """
    known = inspect.signature(loaded.model.forward).parameters
    asked = {"attention_mask": mask_bt, "use_cache": False, "logits_to_keep": keep}
    given = {name: value for name, value in asked.items() if name in known}
    try:
        logits: torch.Tensor = loaded.model(input_ids=ids_bt, **given).logits
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        remedy = "lower --batch-tokens or --context if memory ran out"
        fact = f"the forward pass fails ({first_line(error)})"
        raise TrainError(loaded.path, fact, remedy) from error
    return logits[:, -keep:]


def costs(
    logits: Sequence["torch.Tensor"],
    row_n: "torch.Tensor",
    position_n: "torch.Tensor",
    target_n: "torch.Tensor",
) -> "torch.Tensor":
    """Return nats of each model, and where there are two how far apart their logits are.

    Shapes: logits are [b, k, v] each; the others [n]; the result is [1, n] or [5, n], in the
    order reference nats, model nats, KL(reference || model), agreement, mean squared difference
    of the logits. A token with a logit that is not finite gets NaN for its nats.
    """
    import torch

    chunk = max(1, _CHUNK_BYTES // (4 * logits[0].shape[-1]))
    parts = [
        torch.stack(_chunk_costs([x[row_n[i], position_n[i]].float() for x in logits], target_n[i]))
        for i in (slice(at, at + chunk) for at in range(0, len(target_n), chunk))
    ]
    return torch.cat(parts, dim=1)


def check_causal(loaded: Loaded) -> None:
    """Refuse a model whose prediction depends on what it has to predict.

    Raises:
        TrainError: Changing the last token of a row changes the logits of an earlier one.
    """
    import torch

    ids_bt = (torch.arange(8, device=loaded.device) % loaded.embeddings).repeat(2, 1)
    ids_bt[1, -1] = (ids_bt[1, -1] + 1) % loaded.embeddings
    with torch.inference_mode():
        logits_btv = logits_of(loaded, ids_bt, None, keep=8)[:, :-1].float()
    moved = (logits_btv[0] - logits_btv[1]).abs().max()
    # NaN compares false on purpose: the scoring names the document that meets it.
    if moved > 1e-2 * logits_btv.abs().max():
        fact = "the model reads ahead: a later token changes its prediction of an earlier one"
        raise TrainError(loaded.path, fact, "evaluate causal language models only")


def _chunk_costs(
    logits: Sequence["torch.Tensor"], target_c: "torch.Tensor"
) -> list["torch.Tensor"]:
    logs = [x_cv.log_softmax(-1) for x_cv in logits]
    nats = [-log.gather(1, target_c[:, None])[:, 0] for log in logs]
    nats = [
        n.masked_fill(~x_cv.isfinite().all(-1), float("nan"))
        for n, x_cv in zip(nats, logits, strict=True)
    ]
    if len(logs) == 1:
        return nats
    agreement = (logits[0].argmax(-1) == logits[1].argmax(-1)).float()
    squares = (logits[0] - logits[1]).square().mean(-1)
    return [*nats, _divergence(*logs), agreement, squares]


def _divergence(p_cv: "torch.Tensor", q_cv: "torch.Tensor") -> "torch.Tensor":
    """Return KL(p || q) of log-probabilities, in nats, shape [c].

    The sum of p (log p - log q) - p + q, where the last two cancel in exact arithmetic. In float32
    they take away the rounding of the two normalizers, in which a small divergence would drown.
    Where p and q are near, q - p is p expm1(log q - log p), which keeps its digits. What is left
    may still round below zero, where no divergence is.
    """
    import torch

    d_cv, p, q = p_cv - q_cv, p_cv.exp(), q_cv.exp()
    near = p * (d_cv + torch.expm1(-d_cv))
    return torch.where(d_cv.abs() < 1, near, p * d_cv - p + q).sum(-1).clamp_min(0)
