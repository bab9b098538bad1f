"""Optimisers: AdamW, Muon for matrices, 8-bit AdamW where a package for it is installed."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from surgery.errors import RecipeError, TrainError
from surgery.recover.settings import Settings

if TYPE_CHECKING:
    import torch

MATRIX = 2  # axes
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
