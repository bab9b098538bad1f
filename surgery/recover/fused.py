"""Losses on logits that never exist whole: a few tokens at a time, gradients in the same pass.

The loss of a token and its derivative by the logits are known together, so the forward pass makes
both for a chunk of tokens, multiplies the derivative into the gradients of hidden states and head,
and drops the logits. The backward pass has only a factor left to apply.

Axis letters: n scored tokens, c tokens of a chunk, d width, v vocabulary, k kept by a cache.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from surgery.recover.divergences import DIVERGENCES
from surgery.recover.heads import Head
from surgery.recover.products import Product


@dataclass(frozen=True, slots=True)
class TeacherHidden:
    """A teacher in memory: what its head gets, [n, d'], and the head.

    Attributes:
        layers: its states after each layer, [n, d'] each, where a loss needs them.
    """

    hidden: Tensor
    head: Head
    layers: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class TeacherTopK:
    """A teacher on disk: softmax of `logits` and `tail` together are its probabilities.

    Attributes:
        ids: its likeliest tokens, [n, k].
        logits: theirs, [n, k].
        tail: logarithm of the mass of all other tokens in the same unit, [n].
    """

    ids: Tensor
    logits: Tensor
    tail: Tensor


Teacher = TeacherHidden | TeacherTopK


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a pass computes.

    Attributes:
        head: the student's, whose parameters are passed beside it for their gradients.
        targets: [n]; negative ones are ignored.
        teacher: of the same tokens.
        weights: by the name of a loss on logits.
        temperature: of both distributions in divergences.
        block: bytes of one chunk's logits; a pass holds about eight such blocks.
        tokens: of a chunk at most, or None for what the block takes.
    """

    head: Head
    targets: Tensor
    teacher: Teacher | None
    weights: Mapping[str, float]
    temperature: float
    block: int
    tokens: int | None


class Fused(torch.autograd.Function):
    """Weighted sum over tokens, and the plain sum of each loss."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden_nd: Tensor,
        weight_vd: Tensor,
        bias_v: Tensor | None,
        job: Job,
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted total, [], and the sums, [losses]."""
        device = hidden_nd.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        with torch.autocast(device, enabled=False):
            run = _Pass(hidden_nd, weight_vd, bias_v, job, low or _lower(hidden_nd, weight_vd))
            sums = run.run(ctx.needs_input_grad[:3])
        ctx.gradients = run.gradients()
        ctx.mark_non_differentiable(sums)
        weights = torch.tensor(list(job.weights.values()), dtype=sums.dtype, device=sums.device)
        return (sums * weights).sum(), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Apply the factor in place: a second copy of the head's gradient would be large."""
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a fused loss are gone after one backward pass")
        found, ctx.gradients = ctx.gradients, None
        return (*(None if g is None else g.mul_(factor) for g in found), None)


class _Pass:
    """Buffers of one forward pass, from the first chunk to the last."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job, dtype: torch.dtype
    ) -> None:
        self.hidden_nd, self.weight_vd, self.bias_v, self.job = hidden, weight, bias, job
        self.exact = torch.promote_types(hidden.dtype, torch.float32)
        self.product = Product(weight, dtype, self.exact, job.block)
        theirs = job.teacher
        self.theirs: Product | None = None
        if isinstance(theirs, TeacherHidden):
            low = _lower(theirs.hidden, theirs.head.weight)
            self.theirs = Product(theirs.head.weight, low, self.exact, job.block)
        self.dx: Tensor | None = None
        self.dw: Tensor | None = None
        self.db: Tensor | None = None

    def run(self, wanted: tuple[bool, ...]) -> Tensor:
        """Go through all chunks; return the sums, [losses], float64 on the way."""
        self.dx = torch.zeros_like(self.hidden_nd) if wanted[0] else None
        self.dw = torch.zeros_like(self.weight_vd, dtype=self.exact) if wanted[1] else None
        if wanted[2] and self.bias_v is not None:
            self.db = torch.zeros_like(self.bias_v, dtype=self.exact)
        sums = torch.zeros(len(self.job.weights), dtype=torch.float64, device=self.hidden_nd.device)
        for part in self._parts():
            values, slope_cv = self._chunk(part, needed=any(wanted))
            sums += values
            if slope_cv is not None:
                self._spread(part, slope_cv)
        return sums.to(self.exact)

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Return those of hidden states, head and bias, in the dtypes of these."""
        dw = None if self.dw is None else self.dw.to(self.weight_vd.dtype)
        db = None if self.db is None or self.bias_v is None else self.db.to(self.bias_v.dtype)
        return self.dx, dw, db

    def _parts(self) -> Iterator[Tensor]:
        bytes_of_one = self.exact.itemsize * self.weight_vd.shape[0]
        size = max(self.job.block // bytes_of_one, 1)
        scored = (self.job.targets >= 0).nonzero()[:, 0]
        yield from torch.split(scored, min(size, self.job.tokens or size))

    def _chunk(self, part: Tensor, *, needed: bool) -> tuple[Tensor, Tensor | None]:
        head = self.job.head
        raw_cv = self.product.out(self.hidden_nd[part], self.bias_v)
        logits_cv = bent_(raw_cv, head)
        losses = Losses(self.job, needed=needed)
        values = losses.add(logits_cv, self.job.targets[part], self._teacher(part))
        slope_cv = losses.slope
        if slope_cv is None:
            return values, None
        if head.softcap is not None:
            slope_cv *= 1 - logits_cv.div_(head.softcap).square_()
        return values, slope_cv if head.scale == 1 else slope_cv.mul_(head.scale)

    def _teacher(self, part: Tensor) -> "Tensor | TeacherTopK | None":
        found = self.job.teacher
        if isinstance(found, TeacherTopK):
            return TeacherTopK(found.ids[part], found.logits[part], found.tail[part])
        if found is None or self.theirs is None:
            return None
        return bent_(self.theirs.out(found.hidden[part], found.head.bias), found.head)

    def _spread(self, part: Tensor, slope_cv: Tensor) -> None:
        if self.dx is not None:
            self.dx[part] = self.product.back(slope_cv).to(self.dx.dtype)
        if self.dw is not None:
            self.product.add_outer(self.dw, slope_cv, self.hidden_nd[part])
        if self.db is not None:
            self.db += slope_cv.sum(0)


def _lower(one: Tensor, other: Tensor) -> torch.dtype:
    """Return what to multiply in: models under autocast mix dtypes, and mean the lower one."""
    return min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)


def bent_(raw_cv: Tensor, head: Head) -> Tensor:
    """Scale and soft-cap outputs of the linear map in place."""
    if head.scale != 1:
        raw_cv *= head.scale
    return raw_cv if head.softcap is None else raw_cv.div_(head.softcap).tanh_().mul_(head.softcap)


class Losses:
    """Losses of one chunk, and the slope of their weighted sum by the student's logits, [c, v].

    Divergences are multiplied by the square of the temperature, which keeps their slopes at one
    size (Hinton et al., arXiv 1503.02531, section 2).
    """

    def __init__(self, job: Job, *, needed: bool) -> None:
        self.job, self.needed = job, needed
        self.slope: Tensor | None = None

    def add(
        self, logits_cv: Tensor, targets_c: Tensor, teacher: "Tensor | TeacherTopK | None"
    ) -> Tensor:
        """Return the sum of each loss, [losses], in float64; the logits stay as they are."""
        values: dict[str, Tensor] = {}
        t = self.job.temperature
        logq_cv = (logits_cv if t == 1 else logits_cv / t).log_softmax(-1)
        if isinstance(teacher, TeacherTopK):
            values |= self._few(logq_cv, teacher)
        elif teacher is not None:
            logp_cv = (teacher if t == 1 else teacher.div_(t)).log_softmax(-1)
            del teacher
            values |= self._all(logq_cv, logp_cv)
            del logp_cv
        if "ce" in self.job.weights:
            if t != 1:
                logq_cv = logits_cv.log_softmax(-1)
            values["ce"] = self._ce(logq_cv, targets_c)
        return torch.stack([values[name] for name in self.job.weights])

    def _ce(self, logq_cv: Tensor, targets_c: Tensor) -> Tensor:
        at_c1, weight = targets_c[:, None], self.job.weights["ce"]
        value = -logq_cv.gather(1, at_c1).sum(dtype=torch.float64)
        if self.needed:
            slope_cv = logq_cv.exp_().mul_(weight)
            slope_cv.scatter_add_(1, at_c1, slope_cv.new_full(at_c1.shape, -weight))
            self._lean(slope_cv)
        return value

    def _all(self, logq_cv: Tensor, logp_cv: Tensor) -> dict[str, Tensor]:
        q_cv = logq_cv.exp()
        values, slope_cv = self._divergences(logq_cv, logp_cv, q_cv)
        if slope_cv is not None:  # through the softmax
            self._lean(slope_cv.sub_(q_cv.mul_(slope_cv.sum(-1, keepdim=True))))
        return values

    def _few(self, logq_cv: Tensor, teacher: TeacherTopK) -> dict[str, Tensor]:
        """Compare the kept tokens one by one, and the rest as one outcome."""
        rest_cv = logq_cv.scatter(1, teacher.ids, -torch.inf)
        tail_c1 = rest_cv.logsumexp(-1, keepdim=True)
        logq_ck = torch.cat([logq_cv.gather(1, teacher.ids), tail_c1], -1)
        theirs = torch.cat([teacher.logits, teacher.tail[:, None]], -1).to(logq_ck.dtype)
        values, slope_ck = self._divergences(logq_ck, theirs.log_softmax(-1), logq_ck.exp())
        if slope_ck is not None:  # through the sum of the rest, and through the softmax
            slope_cv = rest_cv.sub_(tail_c1).exp_().mul_(slope_ck[:, -1:])
            slope_cv.scatter_(1, teacher.ids, slope_ck[:, :-1])
            self._lean(slope_cv.sub_(logq_cv.exp().mul_(slope_ck.sum(-1, keepdim=True))))
        return values

    def _divergences(
        self, logq: Tensor, logp: Tensor, q: Tensor
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return the sums, and the slope by log q of the weighted total over the temperature."""
        t, p = self.job.temperature, logp.exp()
        values: dict[str, Tensor] = {}
        total: Tensor | None = None
        for name, divergence in DIVERGENCES.items():
            if name not in self.job.weights:
                continue
            value, slope = divergence(logq, logp, q, p)
            values[name] = value.sum(dtype=torch.float64) * t**2
            slope = slope.mul_(self.job.weights[name] * t)
            total = slope if total is None else total.add_(slope)
        return values, total if self.needed else None

    def _lean(self, slope_cv: Tensor) -> None:
        self.slope = slope_cv if self.slope is None else self.slope.add_(slope_cv)
