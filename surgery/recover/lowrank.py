"""LoRA by peft on every linear layer and on fused experts."""

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from surgery.anatomy import OTHER_TOWERS
from surgery.checkpoint.adapters import MUTATING
from surgery.errors import RecipeError, TrainError
from surgery.lora.choice import Choice
from surgery.lora.written import make_config
from surgery.recover.masks import keep_zeros
from surgery.recover.settings import Settings

if TYPE_CHECKING:
    import torch

EXPERTS = 3  # axes of experts that are held as one parameter
MEASURED = ("eva", "corda")  # starts that look at inputs
STARTS = ("default", "gaussian", "pissa", "olora", "corda", "eva", "orthogonal")
NAME = "default"  # of the adapter
ASKED = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern"),
    *("target_modules", "target_parameters", "fan_in_fan_out"),
)

Samples = Sequence[Mapping[str, Any]]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """The factors in a model.

    Attributes:
        targets: what has them, by the name of the module in memory that holds them.
        scale: alpha / rank.
        start: factors that the base lost at the start, by the same name: (A, B).
    """

    targets: Mapping[str, Target]
    scale: float
    start: "Mapping[str, tuple[torch.Tensor, torch.Tensor]]" = field(default_factory=dict)

    def names(self) -> Iterator[str]:
        """Yield the names of the trained parameters, one of those that share a weight."""
        for module, target in self.targets.items():
            if target.first == target.name:
                yield from (f"{module}.lora_{part}.{NAME}.weight" for part in "AB")


def find_targets(model: Any, settings: Settings) -> tuple[Target, ...]:  # noqa: ANN401
    """Return linear layers and fused experts, without the head and towers for images and sound.

    Raises:
        RecipeError: none is asked for, or the start does not fit them.
    """
    ends = {id(end.weight) for end in _ends(model)}
    firsts: dict[int, str] = {}
    found = [
        _target(settings, name, leaf, weight, firsts, swapped=type(module).__name__ == "Conv1D")
        for name, module in model.named_modules()
        if not OTHER_TOWERS.search(name)
        for leaf, weight in _weights(module)
        if id(weight) not in ends
    ]
    picked = Choice(settings.include, settings.exclude).pick([t.module for t in found])
    targets = tuple(target for target in found if target.module in picked)
    _check(targets, settings)
    return targets


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


def add_lora(
    model: Any,  # noqa: ANN401
    settings: Settings,
    *,
    masked: Collection[str] = (),
    samples: Samples = (),
) -> Lora:
    """Put factors into a model, in place, and freeze everything else.

    Args:
        model: of transformers.
        masked: names of weights whose zeros stay.
        samples: inputs of the model, for the starts that look at them.

    Raises:
        RecipeError: the start does not fit the model, or has no samples.
        TrainError: it needs a package that is not installed.
    """
    import torch

    targets = find_targets(model, settings)
    start = settings.lora_init
    sparse = next((t for t in targets if t.weight in masked), None)
    if sparse is not None and changes_base(start):
        fact = f"changes the zeros of {sparse.weight}, which are to stay"
        raise RecipeError(f"--lora-init {start}", fact, "take default or eva")
    if start in MEASURED and not samples:
        raise RecipeError(f"--lora-init {start}", "looks at inputs, and none are given")
    scale = 1.0 if settings.lora_alpha is None else settings.lora_alpha / settings.rank
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(settings.seed)
        _inject(model, targets, start, scale, samples)
    placed = _placed(model, targets)
    _share(model, placed)
    for module, target in placed.items():
        if target.weight in masked:
            keep_zeros(model.get_submodule(module))
    return Lora(targets=placed, scale=scale, start=_start(model, placed, start))


def _inject(
    model: Any,  # noqa: ANN401
    targets: Sequence[Target],
    start: str,
    scale: float,
    samples: Samples,
) -> None:
    from peft import LoraConfig, get_peft_model, initialize_lora_eva_weights

    told = config_of(targets, scale=scale)
    config = LoraConfig(
        **{key: told[key] for key in ASKED},
        init_lora_weights={"default": True}.get(start, start),
    )
    if start == "corda":
        _measure_corda(model, config, samples)
    if start == "eva":
        from peft import EvaConfig

        config.eva_config = EvaConfig(rho=1.0)
    wrapped = get_peft_model(model, config)
    if start == "eva":
        initialize_lora_eva_weights(wrapped, list(samples), show_progress_bar=False)


def _measure_corda(model: Any, config: Any, samples: Samples) -> None:  # noqa: ANN401
    import torch
    from peft.tuners.lora.config import CordaConfig

    try:
        from peft.tuners.lora.corda import preprocess_corda
    except ImportError as error:
        fact = f"needs a package that peft does not bring ({error})"
        raise TrainError("--lora-init corda", fact, "pip install attrs") from error

    def run() -> None:
        with torch.no_grad():
            for sample in samples:
                model(**sample)

    config.corda_config = CordaConfig(corda_method="kpm")
    preprocess_corda(model, config, run_model=run)


def _placed(model: Any, targets: Sequence[Target]) -> dict[str, Target]:  # noqa: ANN401
    """Return targets by the module that now holds their factors; those of experts are nested."""
    from peft.tuners.lora.layer import LoraLayer

    named = {target.name: target for target in targets}
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            leaf = getattr(module, "parameter_name", "")
            plain = name.replace(".base_layer", "")
            found[name] = named[f"{plain}.{leaf}" if leaf else plain]
    return found


def _share(model: Any, placed: Mapping[str, Target]) -> None:  # noqa: ANN401
    """Give layers that share a weight the same factors."""
    places = {target.name: module for module, target in placed.items()}
    for module, target in placed.items():
        if target.first != target.name and target.first in places:
            own, first = (model.get_submodule(m) for m in (module, places[target.first]))
            for part in ("lora_A", "lora_B"):
                getattr(own, part)[NAME].weight = getattr(first, part)[NAME].weight


def _start(model: Any, placed: Mapping[str, Target], start: str) -> dict[str, Any]:  # noqa: ANN401
    if not changes_base(start):
        return {}
    return {module: tuple(x.detach().clone() for x in pair(model, module)) for module in placed}


def pair(model: Any, module: str) -> "tuple[torch.Tensor, torch.Tensor]":  # noqa: ANN401
    """Return A [rank, in] and B [out, rank] of a layer of peft."""
    layer = model.get_submodule(module)
    return layer.lora_A[NAME].weight, layer.lora_B[NAME].weight


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
