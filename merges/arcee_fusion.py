"""Take from the other model only what changed most where rows changed most."""

from typing import TYPE_CHECKING, Any

from merges.stages.pick import pick
from merges.stages.selection import order_statistics
from surgery.method import Tensor, merge
from surgery.passes import Passes, Slices

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[np.float64]]

EPSILON = 1e-8  # added to every probability
BLOCK = 64 << 10  # elements whose temporaries stay in a core's cache


@merge(source="https://www.arcee.ai", rows=True)
def arcee_fusion(base: Tensor, other: Tensor) -> Passes:
    r"""Replace the base's weights whose importance is an outlier, and keep the rest.

    $$I_{rc} = |W_{1,rc} - W_{0,rc}| \cdot
    \mathrm{KL}\big(\mathrm{softmax}(W_{1,r}) \,\|\, \mathrm{softmax}(W_{0,r})\big), \quad
    W = \begin{cases} W_1 & I \ge Q_2 + 1.5\,(Q_3 - Q_1) \\ W_0 & \text{otherwise} \end{cases}$$

    with 1e-8 added to each probability, and $Q_i$ the tensor's quartiles of $I$: the sorted
    elements at $\lfloor i (n-1) / 4 \rfloor$.

    Shapes: equal, any; rows r along the last axis, a tensor of one axis is one row.

    Source: mergekit 0.1.5; there is no paper. There the divergence, about 1e-7, is computed in
    single precision or below, whose noise decides most of the mask, and the quartiles of tensors
    of more than a million elements come from a random sample. Here both are exact, in double
    precision.
    """
    del other  # a shape only; every pass sees slices
    numel, width = base.numel(), base.shape[-1] if base.ndim else 1
    ranks = [quarter * (numel - 1) // 4 for quarter in (1, 2, 3)]
    known: dict[int, Array] = {}  # divergences by part, far fewer numbers than weights
    ((first, middle, third),) = yield from order_statistics(
        lambda x: [_importance(x, width, known)], [ranks], numel
    )
    threshold = middle + 1.5 * (third - first)
    return lambda x: _fused(x, _importance(x, width, known), threshold)


def _importance(x: Slices, width: int, known: "dict[int, Array]") -> "Array":
    import numpy as np

    before = x.base.numpy().reshape(-1, width)
    after = x.models[0].numpy().reshape(-1, width)
    at = x.part.index
    divergences = known[at] if at in known else _divergences(after, before)
    if at >= 0:  # no sample
        known[at] = divergences
    found = after - before
    np.abs(found, out=found)
    weighed: Array = found * divergences
    return weighed.reshape(x.base.shape)


def _divergences(after: "Array", before: "Array") -> "Array":
    """Return the divergence of each row, [rows, 1]."""
    import numpy as np

    step = max(BLOCK // after.shape[1], 1)
    cuts = [slice(at, at + step) for at in range(0, len(after), step)]
    return np.concatenate([_divergence(after[rows], before[rows]) for rows in cuts])


def _divergence(after: "Array", before: "Array") -> "Array":
    import numpy as np

    p, q = _probabilities(after), _probabilities(before)
    np.divide(p, q, out=q)
    np.log(q, out=q)
    found: Array = np.einsum("rc,rc->r", p, q)[:, None]
    return found


def _probabilities(logits: "Array") -> "Array":
    import numpy as np

    found: Array = logits - logits.max(1, keepdims=True).astype(np.float64)
    np.exp(found, out=found)
    found *= 1 / found.sum(1, keepdims=True)
    found += EPSILON
    return found


def _fused(x: Slices, importance: "Array", threshold: float) -> Tensor:
    """Take what is important; NaN stays, for the engine to name."""
    import numpy as np
    import torch

    made = pick(importance >= threshold, x.models[0].numpy(), x.base.numpy())
    made[np.isnan(importance)] = np.nan
    return torch.from_numpy(made)
