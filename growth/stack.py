"""Depth by repetition: G_stack, depth up-scaling, any explicit layer map."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from growth.depth import MOST_LAYERS, DepthMap, change_depth, check_layers, parse_layers
from growth.residual import writers_among
from surgery.anatomy import Anatomy, anatomy
from surgery.checkpoint import Checkpoint
from surgery.errors import RecipeError
from surgery.plan import Plan

Order = Literal["abab", "aabb"]
RECIPE = (
    "G_stack's authors trained the base at a learning rate of 1e-3 falling to 1e-4 and the "
    "stacked model at 3e-4 falling to 3e-5 with 3000 warm-up steps, weight decay 0.1, betas 0.9 "
    "and 0.95, clipping at 1; the data goes on where the base stopped, the optimiser starts anew."
)


def stack(
    base: Checkpoint,
    *,
    factor: int | None = None,
    order: Order | None = None,
    dus: int | None = None,
    layers: str | None = None,
    scale: Iterable[str] = (),
) -> Plan:
    """Repeat layers; exactly one of `factor`, `dus` and `layers` says how.

    Args:
        base: L layers.
        factor: G copies of the whole stack, G * L layers (G_stack, arXiv 2405.15319).
        order: `abab` repeats the stack as a whole, `aabb` each layer in place.
        dus: m layers are cut from the end of one copy and the start of another (SOLAR depth
            up-scaling, arXiv 2312.15166): layers 0..L-m-1, then m..L-1.
        layers: an explicit map such as `0-23,8-31`; ranges include both ends.
        scale: `[LAYERS:][NAME=]FACTOR` for repeated layers; see `parse_scale`.

    Raises:
        RecipeError: the ask makes no sense for this model.
        PlanError: the architecture cannot be stacked, with the reason.
    """
    parts = anatomy(base)
    sources = _sources(parts.layers, factor=factor, order=order, dus=dus, layers=layers)
    check_layers(sources, parts.layers)
    scale = list(scale)
    parameters: dict[str, Any] = {"factor": factor, "order": order, "dus": dus, "layers": layers}
    factors = _factors(parts, sources, [parse_scale(text, sources) for text in scale])
    return change_depth(
        base,
        DepthMap(sources=sources, scale=factors),
        operation="stack",
        parameters={**parameters, "scale": scale},
        facts={"trainable_layers": list(range(len(sources)))},
    )


def _factors(
    parts: Anatomy, sources: Sequence[int], asks: Iterable["Scale"]
) -> dict[int, dict[str, float]]:
    factors: dict[int, dict[str, float]] = {}
    for ask in asks:
        if not ask.layers:
            fact = "no layer repeats an earlier one, so there is nothing to scale"
            raise RecipeError("--scale", fact, "name the layers: LAYERS:FACTOR")
        for layer in ask.layers:
            names = ask.matching(parts.stack.layers[sources[layer]])
            given = factors.setdefault(layer, {})
            twice = next((name for name in names if name in given), None)
            if twice is not None:
                fact = f"is given two factors for {twice} of layer {layer}"
                raise RecipeError("--scale", fact, "give one")
            given.update(dict.fromkeys(names, ask.factor))
    return factors


def _sources(
    count: int, *, factor: int | None, order: Order | None, dus: int | None, layers: str | None
) -> tuple[int, ...]:
    if sum(option is not None for option in (factor, dus, layers)) != 1:
        fact = "needs exactly one of --factor, --dus and --map"
        raise RecipeError("stack", fact, "for instance --factor 2")
    if order is not None and factor is None:
        raise RecipeError(f"--order {order}", "says nothing without --factor", "leave it out")
    if layers is not None:
        return parse_layers(layers, option="--map")
    if dus is not None:
        return _depth_up_scaling(count, dus)
    return _repeated(count, factor or 0, order or "abab")


def _repeated(count: int, factor: int, order: Order) -> tuple[int, ...]:
    if factor < 1:
        raise RecipeError(f"--factor {factor}", "is below 1", "2 doubles the depth")
    if factor * count > MOST_LAYERS:
        fact = f"gives {factor * count} layers, which no machine could run"
        raise RecipeError(f"--factor {factor}", fact, "2 doubles the depth")
    if order == "aabb":
        return tuple(layer for layer in range(count) for _ in range(factor))
    return tuple(range(count)) * factor


def _depth_up_scaling(count: int, cut: int) -> tuple[int, ...]:
    if not 0 <= cut < count:
        fact = f"is outside 0 to {count - 1} for a model of {count} layers"
        raise RecipeError(f"--dus {cut}", fact, f"the paper cut a quarter: {count // 4}")
    return (*range(count - cut), *range(cut, count))


@dataclass(frozen=True, slots=True)
class Scale:
    """A factor for tensors of some new layers; without a name, for what writes to the stream."""

    layers: tuple[int, ...]
    name: str | None
    factor: float

    def matching(self, names: Iterable[str]) -> list[str]:
        """Return the names within a layer that the factor is for."""
        if self.name is None:
            found, told = sorted(writers_among(names)), "is known to write to the residual stream"
        else:
            found = [name for name in names if self.name in name]
            told = f"has {self.name!r} in its name"
        if not found:
            remedy = "write NAME=FACTOR; surgery inspect --tensors lists the names"
            raise RecipeError("--scale", f"no tensor of a layer {told}", remedy)
        return found


def parse_scale(text: str, sources: tuple[int, ...]) -> Scale:
    """Parse `[LAYERS:][NAME=]FACTOR`.

    LAYERS are numbers of the new model; without them, every layer that repeats an earlier one.
    NAME is a part of tensor names; without it, the weights that write to the residual stream.

    Raises:
        RecipeError: not of that form, or a factor that is not finite.
    """
    head, colon, rest = text.rpartition(":")
    name, equals, number = rest.rpartition("=")
    try:
        factor = float(number)
    except ValueError as error:
        fact = f"{number!r} is not a number"
        raise RecipeError(f"--scale {text}", fact, "write [LAYERS:][NAME=]FACTOR") from error
    if not math.isfinite(factor):
        raise RecipeError(f"--scale {text}", "the factor is not finite")
    seen = [i for i, source in enumerate(sources) if source in sources[:i]]
    layers = parse_layers(head, option="--scale") if colon else tuple(seen)
    check_layers(layers or (0,), len(sources))
    return Scale(layers, name if equals else None, factor)


@dataclass(frozen=True, slots=True)
class Advice:
    """When to grow, by the paper's fitted rule, in tokens and parameters.

    Attributes:
        base_parameters: of the model at hand.
        grown_parameters: N, of the stacked model.
        tokens: D, the budget for the stacked model's training.
        flops: C = 6 N D.
        growth_tokens: d, for how many tokens to train the base before stacking.
        factor: the growth factor the paper found best.
    """

    base_parameters: int
    grown_parameters: int
    tokens: float
    flops: float
    growth_tokens: float
    factor: int = 4

    @property
    def pays(self) -> bool:
        """Whether the base would be trained for less than the whole budget."""
        return self.growth_tokens < self.tokens

    def as_dict(self) -> Mapping[str, Any]:
        """Return the fields as a plain table."""
        return {**{name: getattr(self, name) for name in self.__slots__}, "pays": self.pays}


def advise(*, base_parameters: int, grown_parameters: int, tokens: float) -> Advice:
    """Apply the growth-timing rule log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74.

    Raises:
        RecipeError: the budget is not a positive number.

    Source: "Stacking Your Transformers", arXiv 2405.15319, section 4 (fit on models of up to
    3B parameters), with C = 6 N D.
    """
    if not (tokens > 0 and math.isfinite(tokens)):
        fact = "is not a positive number"
        raise RecipeError(f"--tokens {tokens:g}", fact, "give the training budget, such as 300B")
    flops = 6 * grown_parameters * tokens
    exponent = 0.88 * math.log10(grown_parameters) + 163.27 / math.log10(flops) - 5.74
    return Advice(base_parameters, grown_parameters, tokens, flops, 10**exponent)
