"""LoRA by peft on every linear layer and on fused experts."""

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from surgery.errors import RecipeError, TrainError
from surgery.recover.masks import keep_zeros
from surgery.recover.settings import Settings
from surgery.recover.targets import Target, changes_base, config_of, find_targets

if TYPE_CHECKING:
    import torch

MEASURED = ("eva", "corda")  # starts that look at inputs
NAME = "default"  # of the adapter
PARTS = ("lora_A", "lora_B")
ASKED = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern"),
    *("target_modules", "target_parameters", "fan_in_fan_out"),
)

Samples = Sequence[Mapping[str, Any]]


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
    with _names_as_they_are(model), _drawn(model):
        wrapped = get_peft_model(model, config)
    if start == "eva":
        initialize_lora_eva_weights(wrapped, list(samples), show_progress_bar=False)


@contextmanager
def _names_as_they_are(model: Any) -> Iterator[None]:  # noqa: ANN401
    """Keep peft from renaming targets.

    For some mixtures it takes every `gate_proj` for one of an expert that older versions stored
    alone, those of dense layers and shared experts too, by the config's `model_type`.
    """
    kept = model.config.model_type
    model.config.model_type = "named exactly"
    try:
        yield
    finally:
        model.config.model_type = kept


@contextmanager
def _drawn(model: Any) -> Iterator[None]:  # noqa: ANN401
    """Keep the factors that are drawn for a model without values, which peft leaves without too."""
    import torch
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    if not any(p.is_meta for p in model.parameters()):
        yield
        return
    drawn: dict[Any, list[torch.Tensor]] = {}
    real = LoraLayer.reset_lora_parameters

    def draw(layer: Any, name: str, start: object) -> None:  # noqa: ANN401
        real(layer, name, start)
        weights = (getattr(layer, part)[name].weight for part in PARTS)
        drawn[layer] = [weight.detach().clone() for weight in weights]

    LoraLayer.reset_lora_parameters = draw
    try:
        yield
    finally:
        LoraLayer.reset_lora_parameters = real
    for layer, values in drawn.items():
        base = (
            layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight
        )
        for part, value in zip(PARTS, values, strict=True):
            held = getattr(layer, part)[NAME]
            # peft rounds them to the base's dtype before it holds them in float32.
            rounded = value.to(base.dtype).to(held.weight.dtype)
            held.weight = torch.nn.Parameter(rounded, requires_grad=held.weight.requires_grad)


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
                for row in range(len(next(iter(sample.values())))):  # its hook takes one at a time
                    model(**{name: tensor[row : row + 1] for name, tensor in sample.items()})

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
            for part in PARTS:
                getattr(own, part)[NAME].weight = getattr(first, part)[NAME].weight


def _start(model: Any, placed: Mapping[str, Target], start: str) -> dict[str, Any]:  # noqa: ANN401
    if not changes_base(start):
        return {}
    return {module: tuple(x.detach().clone() for x in pair(model, module)) for module in placed}


def pair(model: Any, module: str) -> "tuple[torch.Tensor, torch.Tensor]":  # noqa: ANN401
    """Return A [rank, in] and B [out, rank] of a layer of peft."""
    layer = model.get_submodule(module)
    return layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
