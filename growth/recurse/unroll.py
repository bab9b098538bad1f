"""A recursive model back as a stock one: every depth a layer of its own."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from growth.recurse.block import bands, merged
from growth.recurse.config import GUARD, MODELLING_FILE
from growth.recurse.formats import ARCHITECTURES, PARTS, Part
from growth.recurse.survey import PREFIX, WEIGHT
from surgery.anatomy import RECURSIVE, split_layer
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.errors import CheckpointError, PlanError, RecipeError
from surgery.lora.written import key, make_config
from surgery.plan import Plan, Step, TensorSpec, check_plan
from surgery.preflight import TEMPORARIES

FACTORS = ("lora_A", "lora_B")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tied:
    """An opened recursive checkpoint.

    Attributes:
        layer_map: for each depth its block.
        stock: the config of the unrolled model.
        layers: for each depth the place of every tensor but factors, by its name in the layer.
        factors: for each depth A and B by linear layer.
        outside: names of all other tensors.
    """

    source: Checkpoint
    layer_map: tuple[int, ...]
    stock: dict[str, Any]
    layers: tuple[dict[str, TensorInfo], ...]
    factors: tuple[dict[str, tuple[TensorInfo, TensorInfo]], ...]
    outside: tuple[str, ...]


def materialize(tied: Checkpoint) -> Plan:
    """Write every depth as a layer of its own, the factors added: W + B A, rounded once.

    Raises:
        PlanError: it is no recursive model.
        CheckpointError: it is damaged.
    """
    opened = open_tied(tied)
    steps = [*_outside(opened)]
    for depth, layer in enumerate(opened.layers):
        for rest, tensor in layer.items():
            pair = opened.factors[depth].get(rest.removesuffix(WEIGHT))
            name = f"{PREFIX}.{depth}.{rest}"
            steps.append(_merge(name, tensor, *pair) if pair else _copy(tensor, name))
    return _plan(opened, steps, "recurse materialize", {}, opened.stock)


def untie(tied: Checkpoint, *, part: Part | None = None) -> Plan:
    """Write every depth as a layer of its own, the factors kept apart as an adapter of peft.

    Each layer has its own copy of the tied weights, so that merging the adapter is exact.

    Args:
        part: `base` or `adapter`; None for a model without factors, whose base is all.

    Raises:
        RecipeError: a part is asked for that there is not, or none of two.
        PlanError: it is no recursive model.
        CheckpointError: it is damaged.
    """
    opened = open_tied(tied)
    has_factors = any(opened.factors)
    if part not in (PARTS if has_factors else (None,)):
        has = f"has the parts {' and '.join(PARTS)}" if has_factors else "has no parts"
        raise RecipeError(tied.ref, f"{has}, not {part}")
    if part == "adapter":
        return _adapter(opened)
    steps = [*_outside(opened)]
    for depth, layer in enumerate(opened.layers):
        steps += [_copy(t, f"{PREFIX}.{depth}.{rest}") for rest, t in layer.items()]
    return _plan(opened, steps, "recurse untie", {"part": part}, opened.stock)


def open_tied(source: Checkpoint) -> Tied:
    """Read which tensor each depth uses.

    Raises:
        PlanError: it is no recursive model.
        CheckpointError: the config or a tensor is missing or makes no sense.
    """
    config = source.config or {}
    if config.get("model_type") != RECURSIVE:
        remedy = "surgery recurse tie or relax makes one"
        raise PlanError(source.ref, "is no recursive model", remedy)
    layer_map = _layer_map(source, config)
    found: list[dict[str, TensorInfo]] = [{} for _ in layer_map]
    factors: list[dict[str, dict[str, TensorInfo]]] = [{} for _ in layer_map]
    outside = []
    for name, tensor in source.tensors.items():
        inside = split_layer(name, PREFIX)
        if inside is None:
            outside.append(name)
            continue
        depth, rest = inside
        if depth >= len(layer_map):
            fact = f"is of a depth that the layer_map does not have ({len(layer_map)})"
            raise CheckpointError(name, fact, "restore the config")
        module, _, part = rest.removesuffix(WEIGHT).rpartition(".")
        if part in FACTORS:
            factors[depth].setdefault(module, {})[part] = tensor
        else:
            found[depth][rest] = tensor
    return Tied(
        source=source,
        layer_map=layer_map,
        stock=stock_config(config),
        layers=tuple(_filled(source, config, layer_map, found)),
        factors=tuple(_pairs(depth, own) for depth, own in enumerate(factors)),
        outside=tuple(outside),
    )


def stock_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the unrolled model that a recursive config describes."""
    text = {name: value for name, value in config["text_config"].items() if name != GUARD}
    stock = config.get(ARCHITECTURES)
    back = {"architectures": stock} if stock else {}
    back["model_type"] = config["base_model_type"]
    told = {name: config[name] for name in ("dtype",) if name in config}
    return {**back, **text, **back, **told}


def _layer_map(source: Checkpoint, config: Mapping[str, Any]) -> tuple[int, ...]:
    found = config.get("layer_map")
    place = source.root / "config.json"
    whole = isinstance(found, list) and bool(found)
    if not whole or any(type(block) is not int or block < 0 for block in found or ()):
        raise CheckpointError(place, "has no usable layer_map", "restore the config")
    text = config.get("text_config")
    if not isinstance(text, dict) or not isinstance(config.get("base_model_type"), str):
        raise CheckpointError(place, "does not say what model it unrolls to", "restore the config")
    assert isinstance(found, list)  # noqa: S101 - as was looked at
    if text.get("num_hidden_layers") != len(found):
        fact = f"has a layer_map of {len(found)} for {text.get('num_hidden_layers')} layers"
        raise CheckpointError(place, fact, "restore the config")
    return tuple(found)


def _filled(
    source: Checkpoint,
    config: Mapping[str, Any],
    layer_map: Sequence[int],
    found: Sequence[dict[str, TensorInfo]],
) -> Iterator[dict[str, TensorInfo]]:
    """Yield each depth's tensors, shared ones from the first depth of its block."""
    own = set(config.get("per_depth") or ())
    whole = {rest for layer in found for rest in layer}
    for depth, block in enumerate(layer_map):
        first = layer_map.index(block)
        layer = {}
        for rest in sorted(whole):
            at = depth if rest in own else first
            if rest not in found[at]:
                name = f"{PREFIX}.{at}.{rest}"
                raise CheckpointError(source.ref, f"has no tensor {name!r}", "copy it again")
            layer[rest] = found[at][rest]
        yield layer


def _pairs(
    depth: int, own: Mapping[str, Mapping[str, TensorInfo]]
) -> dict[str, tuple[TensorInfo, TensorInfo]]:
    for module, pair in own.items():
        if len(pair) != len(FACTORS):
            missing = next(part for part in FACTORS if part not in pair)
            name = f"{PREFIX}.{depth}.{module}.{missing}.weight"
            raise CheckpointError(name, "is missing", "the checkpoint is incomplete: copy it again")
    return {module: (pair["lora_A"], pair["lora_B"]) for module, pair in own.items()}


def _copy(tensor: TensorInfo, name: str) -> Step:
    return Step(inputs=(tensor,), outputs=((name, TensorSpec(tensor.dtype, tensor.shape)),))


def _outside(opened: Tied) -> Iterator[Step]:
    yield from (_copy(opened.source.tensors[name], name) for name in opened.outside)


def _merge(name: str, weight: TensorInfo, a: TensorInfo, b: TensorInfo) -> Step:
    n, m = weight.shape
    rank = a.shape[0]
    if a.shape != (rank, m) or b.shape != (n, rank):
        fact = f"is {list(a.shape)} beside {list(b.shape)}, for a weight {list(weight.shape)}"
        raise CheckpointError(a.name, fact, "the checkpoint is damaged: copy it again")

    def fn(w: Any, low: Any, high: Any) -> Iterator[Any]:  # noqa: ANN401 - `Stored` tensors
        yield from merged(w, high[...], low[...], (n, m))

    rows = next(bands((n, m))).stop
    return Step(
        outputs=((name, TensorSpec(weight.dtype, weight.shape)),),
        inputs=(weight, a, b),
        fn=fn,
        streamed=True,
        scratch=8 * (rank * (n + m) + TEMPORARIES * rows * m),
        why="merge factors",
    )


def _adapter(opened: Tied) -> Plan:
    steps, ranks = [], {}
    for depth, own in enumerate(opened.factors):
        for module, pair in own.items():
            full = f"{PREFIX}.{depth}.{module}"
            ranks[full] = pair[0].shape[0]
            steps += [_copy(t, key(full, part)) for t, part in zip(pair, "AB", strict=True)]
    config = make_config(ranks, base=None, task="CAUSAL_LM")
    return _plan(opened, steps, "recurse untie", {"part": "adapter"}, config, adapter=True)


def _plan(
    opened: Tied,
    steps: Sequence[Step],
    operation: str,
    parameters: dict[str, Any],
    config: dict[str, Any],
    *,
    adapter: bool = False,
) -> Plan:
    source = opened.source
    used = {tensor.name for step in steps for tensor in step.inputs}
    why = "no part of the adapter" if adapter else "factors are the adapter's"
    carried = tuple(path for path in source.carried if path.name != MODELLING_FILE)
    joined = _joined(steps)
    return check_plan(
        Plan(
            operation=operation,
            parameters=parameters,
            sources=(source,),
            steps=joined,
            order=tuple(name for step in steps for name, _ in step.outputs),
            config=config,
            carried=() if adapter else carried,
            dropped={name: why for name in source.tensors if name not in used},
            facts={"layer_map": list(range(len(opened.layers)))},
            notes=source.notes,
            adapter=adapter,
        )
    )


def _joined(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Make one step of all copies of a tensor, so that it is read once."""
    copies: dict[str, list[Step]] = {}
    for step in steps:
        if step.is_copy:
            copies.setdefault(step.inputs[0].name, []).append(step)
    made = [
        Step(inputs=same[0].inputs, outputs=tuple(o for step in same for o in step.outputs))
        for same in copies.values()
    ]
    return (*made, *(step for step in steps if not step.is_copy))
