"""What a user should know of a recursion: its size, the energy kept, and where it is unwise."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from growth.recurse.formats import Ranks
from growth.recurse.loops import Init
from growth.recurse.ranks import dense_rank, shapes
from growth.recurse.survey import Looped
from surgery.layers.rules import told_layers
from surgery.plan import Plan

IN_LAYER = re.compile(r"layers\.\d+\.(?P<module>.+?)(\.lora_[AB])?\.weight$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Numbers of parameters: of the model, of its layers alone, and of their recursive form."""

    model: int
    layers: int
    recursive: int

    @property
    def ratio(self) -> float:
        """The share of the model's parameters that the recursive form holds."""
        return (self.model - self.layers + self.recursive) / self.model

    @property
    def layer_ratio(self) -> float:
        """The share of the layers' parameters."""
        return self.recursive / self.layers


def size(looped: Looped, ranks: Ranks) -> Size:
    """Count parameters."""
    tensors = looped.base.tensors
    depths, blocks = len(looped.loops.layer_map), looped.loops.blocks
    linear = sum(looped.tensor(0, rest).numel for rest in looped.linears)
    gains = sum(looped.tensor(0, rest).numel for rest in looped.gains)
    sides = {name: sum(shape) for name, shape in shapes(looped).items()}
    factors = sum(rank * sides[name] for name, own in ranks.items() for rank in own)
    return Size(
        model=sum(tensor.numel for tensor in tensors.values()),
        layers=depths * (linear + gains),
        recursive=blocks * linear + (blocks if looped.tie_norms else depths) * gains + factors,
    )


def facts(looped: Looped, ranks: Ranks) -> dict[str, Any]:
    """Return what is recorded for later commands."""
    counted = size(looped, ranks)
    return {
        "layer_map": list(looped.loops.layer_map),
        "starts": [list(sources) for sources in looped.loops.sources],
        "per_depth": list(looped.per_depth),
        "ranks": {name: list(own) for name, own in ranks.items()},
        "parameter_ratio": counted.ratio,
        "parameter_ratio_of_layers": counted.layer_ratio,
    }


def notes(looped: Looped, ranks: Ranks, *, init: Init, rank: int | None) -> Iterator[str]:
    """Yield what a user should know before it runs.

    Args:
        rank: as asked for every layer, if one was.
    """
    counted = size(looped, ranks)
    told = (
        f"the recursive form holds {counted.ratio:.1%} of the model's parameters, "
        f"{counted.layer_ratio:.1%} of those in the layers"
    )
    yield told if counted.ratio <= 1 else f"warning: {told}: more than the model; take lower ranks"
    limits = {name: dense_rank(shape) for name, shape in shapes(looped).items()}
    over = [name for name, own in ranks.items() if max(own) > limits[name]]
    if over:
        yield (
            f"above rank {limits[over[0]]} the factors of {over[0]} take more than a dense "
            f"difference would ({len(over)} of {len(limits)} linear layers are above theirs)"
        )
    capped = [name for name, own in ranks.items() if rank is not None and max(own) < rank]
    if capped:
        most = max(ranks[capped[0]])
        yield f"no rank is above a matrix's shorter side: {capped[0]} gets rank {most}"
    low = any(rank < limits[name] for name, own in ranks.items() for rank in own if rank)
    if init == "stepwise" and low:
        yield (
            "stepwise starts with factors did worse in the paper at ranks 128 to 512 than without "
            "any; --init average fell with every rank"
        )
    yield from _kinds(looped)


def _kinds(looped: Looped) -> Iterator[str]:
    kinds = told_layers(looped.config, looped.parts)
    if kinds is None:
        return
    by_block = {(block, kind) for block, kind in zip(looped.loops.layer_map, kinds, strict=True)}
    if len(by_block) > looped.loops.blocks:
        yield "layers of different kinds (layer_types) share a block: each depth keeps its own kind"


def captured(plan: Plan, told: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return the share of the squared residuals that is kept, by linear layer and in all."""
    kept: dict[str, float] = {}
    whole: dict[str, float] = {}
    limits: dict[str, int] = {}
    for step in plan.steps:
        figures = told.get(step.outputs[0][0], {})
        found = IN_LAYER.search(step.outputs[0][0])
        if found and "energy" in figures:
            module = found["module"]
            kept[module] = kept.get(module, 0.0) + figures["energy"] * figures["_change"]
            whole[module] = whole.get(module, 0.0) + figures["_change"]
            rows, columns = step.inputs[0].shape
            limits[module] = dense_rank((rows, columns))
    if not kept:
        return {}
    modules = [
        _row(name, plan.facts["ranks"][name], limits[name], _share(kept[name], whole[name]))
        for name in kept
    ]
    return {"modules": modules, "energy_in_all": _share(sum(kept.values()), sum(whole.values()))}


def _row(name: str, ranks: Sequence[int], limit: int, share: float) -> dict[str, Any]:
    low, high = min(rank for rank in ranks if rank), max(ranks)
    over = f"above {limit} a dense difference is smaller" if high > limit else ""
    return {
        "module": name,
        "rank": f"{low}" if low == high else f"{low}-{high}",
        "share_of_the_difference_kept": share,
        "warning": over,
    }


def _share(kept: float, whole: float) -> float:
    return kept / whole if whole else 1.0
