"""What LoRA is put on: linear layers, and experts that are one parameter."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.anatomy import OTHER_TOWERS
from surgery.checkpoint.adapters import MUTATING
from surgery.errors import RecipeError
from surgery.lora.choice import Choice
from surgery.lora.written import make_config
from surgery.recover.settings import Settings

if TYPE_CHECKING:
    import torch

EXPERTS = 3  # axes of experts that are held as one parameter
STARTS = ("default", "gaussian", "pissa", "olora", "corda", "eva", "orthogonal")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What gets factors.

    Attributes:
        name: of a linear layer, or of a parameter of three axes.
        rank: of the factors, no larger than a side.
        leaf: the parameter's own name, of experts; empty of a linear layer.
        first: the target that it shares its weight with; its own name if it comes first.
        swapped: the weight is held [in, out].
    """

    name: str
    rank: int
    first: str
    leaf: str = ""
    swapped: bool = False

    @property
    def module(self) -> str:
        """The module that holds the weight."""
        return self.name.removesuffix(f".{self.leaf}") if self.leaf else self.name

    @property
    def weight(self) -> str:
        """The name of the weight."""
        return self.name if self.leaf else f"{self.name}.weight"


def find_targets(model: Any, settings: Settings) -> tuple[Target, ...]:  # noqa: ANN401
    """Return linear layers and fused experts, without the head and towers for images and sound.

    Raises:
        RecipeError: none is asked for, or the start does not fit them.
    """
    firsts: dict[int, str] = {}
    found = [
        _target(settings, name, leaf, weight, firsts, swapped=swapped)
        for name, leaf, weight, swapped in _candidates(model)
    ]
    picked = Choice(settings.include, settings.exclude).pick([t.module for t in found])
    targets = tuple(target for target in found if target.module in picked)
    _check(targets, settings)
    return targets


def has_linears(model: Any) -> bool:  # noqa: ANN401
    """Whether there is anything to put factors on; not where all maps are factored already."""
    return next(_candidates(model), None) is not None


def _candidates(model: Any) -> "Iterator[tuple[str, str, torch.Tensor, bool]]":  # noqa: ANN401
    """Yield module, parameter of experts, weight, and whether that is held [in, out]."""
    ends = {id(end.weight) for end in _ends(model)}
    for name, module in model.named_modules():
        if OTHER_TOWERS.search(name):
            continue
        for leaf, weight in _weights(module):
            if id(weight) not in ends:
                yield name, leaf, weight, type(module).__name__ == "Conv1D"


def _ends(model: Any) -> list[Any]:  # noqa: ANN401
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [end for end in ends if end is not None]


def _weights(module: Any) -> "Iterator[tuple[str, torch.Tensor]]":  # noqa: ANN401
    import torch

    if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
        yield "", module.weight
    elif "expert" in type(module).__name__.lower():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == EXPERTS:
                yield leaf, parameter


def _target(
    settings: Settings,
    module: str,
    leaf: str,
    weight: "torch.Tensor",
    firsts: dict[int, str],
    *,
    swapped: bool,
) -> Target:
    name = f"{module}.{leaf}" if leaf else module
    first = firsts.setdefault(id(weight), name)
    rank = min(settings.rank, *weight.shape[-2:])
    if settings.lora_init == "orthogonal" and rank > 1:
        rank -= rank % 2  # it draws pairs of rows
    return Target(name=name, leaf=leaf, rank=rank, first=first, swapped=swapped)


def _check(targets: Sequence[Target], settings: Settings) -> None:
    start = settings.lora_init
    if not targets:
        raise RecipeError("--train lora", "finds no linear layer to add factors to", "take full")
    if start.partition("_niter")[0] not in STARTS:
        fact = f"is none of {', '.join(STARTS)}"
        if start == "loftq":
            fact = "starts from a quantised base, which is not the student that is written"
        raise RecipeError(f"--lora-init {start}", fact)
    fused = next((t for t in targets if t.leaf), None)
    if fused is not None and start not in {"default", "gaussian"}:
        fact = f"starts from single matrices, and {fused.name} holds all experts"
        raise RecipeError(f"--lora-init {start}", fact, "take default, or --exclude experts")
    shared = next((t for t in targets if t.first != t.name), None)
    if shared is not None and changes_base(start):
        fact = f"takes a part of each weight away, and {shared.name} shares its own"
        raise RecipeError(f"--lora-init {start}", fact, "take default or eva")
    if start in {"olora", "corda"} and any(t.swapped for t in targets):
        fact = "does not know maps that are stored [in, out], as this model's"
        raise RecipeError(f"--lora-init {start}", fact, "take default or pissa")
    odd = next((t for t in targets if t.rank % 2), None)
    if odd is not None and start == "orthogonal":
        raise RecipeError("--lora-init orthogonal", f"needs an even rank, and has {odd.rank}")


def changes_base(start: str) -> bool:
    """Whether a start takes a part of the base's weights into the factors."""
    return start.startswith(MUTATING)


def config_of(
    targets: Sequence[Target],
    *,
    scale: float = 1.0,
    base: str | None = None,
    task: str | None = None,
    whole: Iterable[str] = (),
) -> dict[str, Any]:
    """Return peft's config of targets; ranks of experts go by module and by parameter.

    Args:
        scale: alpha / rank of all of them.
        base, task, whole: as `make_config` takes them.
    """
    ranks: dict[str, int] = {}
    for target in targets:
        ranks[target.module] = min(ranks.get(target.module, target.rank), target.rank)
    ranks |= {target.name: ranks[target.module] for target in targets}
    swapped = any(target.swapped for target in targets)
    told = make_config(ranks, base=base, task=task, whole=whole, fan_in_fan_out=swapped)
    linear = [target.name for target in targets if not target.leaf]
    experts = [target.name for target in targets if target.leaf]
    told |= {"target_modules": linear or None, "target_parameters": experts or None}
    told["lora_alpha"] = told["r"] * scale
    told["alpha_pattern"] = {name: rank * scale for name, rank in told["rank_pattern"].items()}
    return told
