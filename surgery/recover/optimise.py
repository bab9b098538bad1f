"""Optimisers: AdamW, Muon for matrices, 8-bit AdamW where a package for it is installed."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from surgery.errors import RecipeError, TrainError
from surgery.recover.settings import Settings

if TYPE_CHECKING:
    import torch

MATRIX = 2  # axes
# Of what an 8-bit optimiser is tried on: parameters, numbers of each, and how far it may be off.
TRIED, ENOUGH, MOST, ROUNDING = 3, 4096, 1 << 20, 0.1
MUON_SCALE = "match_rms_adamw"  # so that one learning rate fits both (arXiv 2502.16982)


class Optimisers:
    """One optimiser, or two that share the parameters between them, as if they were one.

    Attributes:
        parts: torch's own optimisers; each group has its multiplier under `share`.
    """

    def __init__(self, parts: "Sequence[torch.optim.Optimizer]", peak: float) -> None:
        self.parts, self.peak = list(parts), peak

    def set_rate(self, share: float) -> float:
        """Set the learning rate to a share of the peak, and return it."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.peak * share * group.get("share", 1.0)
        return self.peak * share

    def step(self) -> None:
        """Take a step."""
        for part in self.parts:
            part.step()

    def zero(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)


def make_optimisers(
    groups: Iterable[Mapping[str, Any]],
    settings: Settings,
    *,
    ends: "Collection[torch.Tensor]" = (),
) -> Optimisers:
    """Return the optimiser that the settings ask for.

    Args:
        groups: with `params`, `weight_decay` and `share`, the multiplier of the learning rate.
        ends: the embedding and the head, which Muon is not for.

    Raises:
        RecipeError: Muon with parameters that are no matrices only.
        TrainError: 8-bit AdamW without a package that has it.
    """
    import torch

    given = [dict(group) for group in groups]
    if settings.optimizer == "adamw8bit":
        return Optimisers([_eight_bit(given, settings)], settings.peak)
    common: dict[str, Any] = {"lr": settings.peak, "betas": settings.betas}
    if settings.optimizer == "adamw":
        fused = all(p.is_cuda for group in given for p in group["params"])
        return Optimisers([torch.optim.AdamW(given, fused=fused, **common)], settings.peak)
    matrices, others = _split(given, {id(end) for end in ends})
    if not matrices:
        fact = f"trains matrices, and --train {settings.train} trains none"
        raise RecipeError("--optimizer muon", fact, "take adamw")
    parts: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=settings.peak, adjust_lr_fn=MUON_SCALE)
    ]
    if others:
        parts.append(torch.optim.AdamW(others, **common))
    return Optimisers(parts, settings.peak)


def _split(
    groups: list[dict[str, Any]], ends: set[int]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return groups of hidden matrices, and of everything else."""
    matrices, others = [], []
    for group in groups:
        two = [p for p in group["params"] if p.dim() == MATRIX and id(p) not in ends]
        chosen = {id(p) for p in two}
        rest = [p for p in group["params"] if id(p) not in chosen]
        if two:
            matrices.append({**group, "params": two})
        if rest:
            others.append({**group, "params": rest})
    return matrices, others


def _eight_bit(groups: list[dict[str, Any]], settings: Settings) -> "torch.optim.Optimizer":
    try:
        from torchao.optim import AdamW8bit  # type: ignore[import-not-found]
    except ImportError:
        try:
            from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]
        except ImportError as error:
            fact = "needs torchao or bitsandbytes, and neither is installed"
            raise TrainError("--optimizer adamw8bit", fact, "take adamw") from error
    found: torch.optim.Optimizer = AdamW8bit(groups, lr=settings.peak, betas=settings.betas)
    return found


def check_eight_bit(parameters: "Iterable[torch.nn.Parameter]", settings: Settings) -> None:
    """Refuse an 8-bit AdamW whose first steps are not AdamW's, on the gradients that are there.

    Two steps are taken on copies of a part of a few parameters: the second one uses moments that
    were rounded to 8 bits.

    Raises:
        TrainError: the changes differ by more than a tenth of their length.
    """
    import torch

    chosen = [p for p in parameters if p.grad is not None and p.numel() >= ENOUGH][:TRIED]
    for parameter in chosen:
        weight, gradient = (_part(x) for x in (parameter.detach(), parameter.grad))
        if len(weight) < ENOUGH or not bool(gradient.any()):
            continue
        changes = []
        for make in (_eight_bit, _plain_adamw):
            copy = torch.nn.Parameter(weight.clone())
            optimiser = make([{"params": [copy], "weight_decay": 0.0}], settings)
            for share in (1.0, 0.5):
                copy.grad = gradient * share
                optimiser.step()
            changes.append((copy.detach() - weight).double())
        found, wanted = changes
        off = float((found - wanted).norm() / wanted.norm())
        if not off <= ROUNDING:
            fact = f"changes weights by something else than AdamW does, {off:.0%} off"
            raise TrainError("--optimizer adamw8bit", fact, "take adamw")


def _part(tensor: "torch.Tensor | None") -> "torch.Tensor":
    """Return the first numbers of what lies here of a tensor, flat."""
    from torch.distributed.tensor import DTensor

    assert tensor is not None  # noqa: S101 - chosen so
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.reshape(-1)[:MOST].clone()


def _plain_adamw(groups: list[dict[str, Any]], settings: Settings) -> "torch.optim.Optimizer":
    import torch

    return torch.optim.AdamW(groups, lr=settings.peak, betas=settings.betas)
