"""What a student is trained on: weighted sums of losses over the scored tokens of a batch.

Axis letters: n tokens of a batch, those that are not scored included; d width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgery.errors import RecipeError
from surgery.recover.divergences import DIVERGENCES
from surgery.recover.fused import Fused, Job, Teacher, TeacherHidden, TeacherTopK
from surgery.recover.heads import Head, check_vocabularies
from surgery.recover.hidden import HIDDEN, hidden_losses

__all__ = ["EARLY_EXIT", "LossParts", "Objective", "Teacher", "TeacherHidden", "TeacherTopK"]

EARLY_EXIT = 0.1  # weight of every loop but the last (arXiv 2410.20672, "aggressive" coefficient)
ON_LOGITS = ("ce", *DIVERGENCES)
KNOWN = (*ON_LOGITS, *HIDDEN, "early_exit")
BLOCKS = {"cuda": 256 << 20}  # bytes of a chunk's logits: enough tokens to keep the device busy
BLOCK = 32 << 20  # elsewhere


@dataclass(frozen=True, slots=True)
class LossParts:
    """Sums over the scored tokens of a batch.

    Attributes:
        total: the weighted sum, differentiable once.
        parts: each loss without its weight, without gradients.
        tokens: how many were scored.
    """

    total: Tensor
    parts: Mapping[str, Tensor]
    tokens: int


@dataclass(frozen=True, slots=True)
class Objective:
    """A weighted sum of losses.

    - `ce`: cross-entropy of the next token, in nats.
    - `kl`, `rkl`, `jsd`, `tvd`: see `divergences`, times the temperature's square.
    - `hidden_mse`, `hidden_cos`: see `hidden`.
    - `early_exit`: for the state after each loop but the last, cross-entropy plus the forward KL
      from the model's own last logits, which are detached (Relaxed Recursive Transformers,
      arXiv 2410.20672, section 3.3, where the two are weighted alike here).

    Attributes:
        weights: by name; what weighs nothing is not computed.
        temperature: of student and teacher in divergences; 1 where the teacher is cached.
        chunk_tokens: tokens whose logits are held at once; None for what `chunk_bytes` takes.
        chunk_bytes: of one chunk's logits; a pass holds about eight times as much. None for what
            fits the device.
        projector: from the student's width to the teacher's, in losses on hidden states.
    """

    weights: Mapping[str, float]
    temperature: float = 1.0
    chunk_tokens: int | None = None
    chunk_bytes: int | None = None
    projector: nn.Module | None = None

    def __post_init__(self) -> None:
        """Refuse names that no loss has.

        Raises:
            RecipeError: there is one, or no loss weighs anything.
        """
        unknown = [name for name in self.weights if name not in KNOWN]
        if unknown:
            raise RecipeError(f"--loss {unknown[0]}", f"is no loss; there are {', '.join(KNOWN)}")
        if not any(self.weights.values()):
            raise RecipeError("--loss", "names no loss", "for instance kl=1 or ce=1")

    @property
    def asks_layers(self) -> bool:
        """Whether states after each layer are compared, where they are at hand."""
        return any(self.weights.get(name) for name in HIDDEN)

    @property
    def asks_loops(self) -> bool:
        """Whether states after each loop are needed."""
        return bool(self.weights.get("early_exit"))

    def check(self, *, cached: bool) -> None:
        """Refuse what a teacher cannot answer.

        Raises:
            RecipeError: hidden states or another temperature of a cached teacher.
        """
        if not cached:
            return
        if self.asks_layers:
            fact = "compares hidden states, and a cache holds logits alone"
            raise RecipeError("--loss hidden", fact, "name the model with --teacher")
        if self.temperature != 1 and any(self.weights.get(name) for name in DIVERGENCES):
            fact = "is not 1, and a cache tells the mass of its tail at 1 alone"
            raise RecipeError(f"--temperature {self.temperature:g}", fact, "leave it out")

    def __call__(
        self,
        hidden_nd: Tensor,
        head: Head,
        targets_n: Tensor,
        teacher: Teacher | None = None,
        *,
        layers: Sequence[Tensor] = (),
        loops: Sequence[Tensor] = (),
    ) -> LossParts:
        """Return the losses of a batch.

        Args:
            hidden_nd: what goes into the head.
            head: the student's; its parameters get gradients if they are trained.
            targets_n: the next token of each, negative where nothing is predicted.
            teacher: its answers to the same n tokens.
            layers: states after each layer of the student.
            loops: what would go into the head after each loop but the last.

        Raises:
            RecipeError: a loss asks what teacher or student do not tell.
        """
        wanted = {name: weight for name, weight in self.weights.items() if weight}
        self._check(wanted, head, teacher, loops)
        scored = targets_n >= 0
        total = hidden_nd.new_zeros((), dtype=torch.promote_types(hidden_nd.dtype, torch.float32))
        parts: dict[str, Tensor] = {}
        on_logits = {name: weight for name, weight in wanted.items() if name in ON_LOGITS}
        if on_logits:
            total, parts = self._fused(hidden_nd, head, targets_n, teacher, on_logits)
        hidden = [name for name in wanted if name in HIDDEN]
        if hidden and isinstance(teacher, TeacherHidden):
            own = self.projector
            found = hidden_losses(hidden, hidden_nd, layers, teacher, scored, projector=own)
            total = total + sum(wanted[name] * found[name] for name in hidden)
            parts |= {name: value.detach() for name, value in found.items()}
        if "early_exit" in wanted:
            exits = self._exits(hidden_nd, head, targets_n, loops)
            total = total + wanted["early_exit"] * exits
            parts["early_exit"] = exits.detach()
        return LossParts(total, parts, int(scored.sum()))

    def _check(
        self,
        wanted: Mapping[str, float],
        head: Head,
        teacher: Teacher | None,
        loops: Sequence[Tensor],
    ) -> None:
        asking = [name for name in wanted if name not in {"ce", "early_exit"}]
        if asking and teacher is None:
            fact = "compares with a teacher, and there is none"
            raise RecipeError(f"--loss {asking[0]}", fact, "name the parent with --teacher")
        if "early_exit" in wanted and not loops:
            raise RecipeError("--loss early_exit", "the student has no loops", "leave it out")
        self.check(cached=isinstance(teacher, TeacherTopK))
        if isinstance(teacher, TeacherHidden):
            check_vocabularies(head, teacher.head, "the teacher")

    def _fused(
        self,
        hidden_nd: Tensor,
        head: Head,
        targets_n: Tensor,
        teacher: Teacher | None,
        weights: Mapping[str, float],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        asked = any(name in DIVERGENCES for name in weights)
        job = Job(
            head=head.detached(),
            targets=targets_n,
            teacher=teacher if asked else None,
            weights=weights,
            temperature=self.temperature,
            block=self.chunk_bytes or BLOCKS.get(hidden_nd.device.type, BLOCK),
            tokens=self.chunk_tokens,
        )
        total, sums = Fused.apply(hidden_nd, head.weight, head.bias, job)  # type: ignore[no-untyped-call]
        return total, dict(zip(weights, sums, strict=True))

    def _exits(
        self, hidden_nd: Tensor, head: Head, targets_n: Tensor, loops: Sequence[Tensor]
    ) -> Tensor:
        last = TeacherHidden(hidden_nd.detach(), head.detached())
        weights = {"ce": 1.0, "kl": 1.0}
        found = [self._fused(x_nd, head, targets_n, last, weights)[0] for x_nd in loops]
        return torch.stack(found).sum()
