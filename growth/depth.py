"""One abstraction for every change of depth: which source layer each new layer comes from."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from surgery.anatomy import Anatomy, anatomy
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.errors import PlanError, RecipeError
from surgery.layers.config import remap_config
from surgery.layers.kinds import check_kinds
from surgery.plan import Function, Plan, Step, TensorSpec, check_plan

NUMBER = re.compile(r"[0-9]{1,5}")  # no model has more layers, and a slip would fill the memory
MOST_LAYERS = 100_000
SCALABLE = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthMap:
    """New layers in terms of old ones.

    Attributes:
        sources: new layer i comes from layer `sources[i]`.
        zero: per new layer the names (within the layer) of tensors that become zero.
        scale: per new layer the factors of tensors, by name within the layer.
    """

    sources: tuple[int, ...]
    zero: Mapping[int, frozenset[str]] = field(default_factory=dict)
    scale: Mapping[int, Mapping[str, float]] = field(default_factory=dict)


def change_depth(
    base: Checkpoint,
    depth: DepthMap,
    *,
    operation: str,
    parameters: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
) -> Plan:
    """Compile a depth map to a plan: bytes copied, zeros written, factors applied.

    Layers that follow the model's own (next-token predictors) keep their order at the end.

    Raises:
        RecipeError: the map is empty or names a layer that does not exist.
        PlanError: the config cannot describe the result, or a tensor cannot be scaled.
    """
    parts = anatomy(base)
    check_layers(depth.sources, parts.layers)
    sources = (*depth.sources, *range(parts.layers, parts.layers + parts.extra_layers))
    if base.config is None and not base.bare:
        fact = "holds no config.json, so the result could not be loaded"
        raise PlanError(base.root, fact, "name the .safetensors file itself for a bare result")
    if parts.lost_head:
        fact = "does not tie the output head to the embedding, but there is no head"
        remedy = "set tie_word_embeddings to true if it is tied, or restore the missing tensor"
        raise PlanError(base.root / "config.json", fact, remedy)
    placed = list(_placed(base, parts, sources))
    config = base.config and remap_config(dict(base.config), parts, depth.sources)
    if depth.sources != tuple(range(parts.layers)):
        check_kinds(base, parts)
    dropped = [n for n in range(parts.layers) if n not in depth.sources]
    return check_plan(
        Plan(
            operation=operation,
            parameters=parameters,
            sources=(base,),
            steps=tuple(_steps(base, parts, depth, placed)),
            order=tuple(name for name, _ in placed),
            config=config,
            carried=base.carried,
            dropped=_dropped(base, parts, dropped),
            facts={"layer_map": list(depth.sources), **(facts or {})},
            notes=tuple(_notes(base, parts, len(depth.sources))),
        )
    )


def check_layers(sources: Sequence[int], layers: int) -> None:
    """Refuse a map that is empty or that names layers which do not exist."""
    if not sources:
        raise RecipeError("the layer map", "leaves no layer", "keep at least one")
    if len(sources) > MOST_LAYERS:
        fact = f"gives {len(sources)} layers, which no machine could run"
        raise RecipeError("the layer map", fact, f"stay below {MOST_LAYERS}")
    beyond = next((n for n in sources if not 0 <= n < layers), None)
    if beyond is not None:
        fact = f"names layer {beyond}, but the model has layers 0 to {layers - 1}"
        raise RecipeError("the layer map", fact, "layers count from 0, ranges include both ends")


def _placed(
    base: Checkpoint, parts: Anatomy, sources: Sequence[int]
) -> Iterable[tuple[str, TensorInfo]]:
    """Yield new names with their source tensors, in layer order, the rest around them."""
    outside = [name for name in base.tensors if parts.locate(name) is None]
    first = next((i for i, name in enumerate(base.tensors) if parts.locate(name)), 0)
    before = set(list(base.tensors)[:first]) | {parts.embedding}
    yield from ((name, base.tensors[name]) for name in outside if name in before)
    for layer, source in enumerate(sources):
        for rest in parts.stack.layers[source]:
            tensor = base.tensors[parts.stack.name(source, rest)]
            yield parts.stack.name(layer, rest), tensor
    yield from ((name, base.tensors[name]) for name in outside if name not in before)


def _steps(
    base: Checkpoint, parts: Anatomy, depth: DepthMap, placed: Iterable[tuple[str, TensorInfo]]
) -> Iterable[Step]:
    """Yield steps; all plain copies of one source tensor are one step, read once."""
    copies: dict[str, list[tuple[str, TensorSpec]]] = {}
    for name, tensor in placed:
        spec = TensorSpec(tensor.dtype, tensor.shape)
        layer, rest = parts.locate(name) or (-1, name)
        if rest in depth.zero.get(layer, ()):
            yield Step(outputs=((name, spec),), why="zero")
        elif (factor := depth.scale.get(layer, {}).get(rest, 1.0)) != 1.0:
            yield _scaled(name, tensor, spec, factor)
        else:
            copies.setdefault(tensor.name, []).append((name, spec))
    for name, outputs in copies.items():
        yield Step(inputs=(base.tensors[name],), outputs=tuple(outputs))


def _scaled(name: str, tensor: TensorInfo, spec: TensorSpec, factor: float) -> Step:
    if spec.dtype not in SCALABLE:
        fact = f"is stored as {spec.dtype}, which is not scaled"
        raise PlanError(name, fact, "dequantise the checkpoint first")
    fn: Function = partial(_multiply, factor=factor)
    why = f"scale by {factor:g}"
    return Step(
        inputs=(tensor,),
        outputs=((name, spec),),
        fn=fn,
        elementwise=True,
        plain=True,
        why=why,
    )


def _multiply(x: Any, *, factor: float) -> Any:  # noqa: ANN401 - a tensor; torch is not imported
    return x * factor


def _dropped(base: Checkpoint, parts: Anatomy, layers: Iterable[int]) -> dict[str, str]:
    gone = set(layers)
    found = {}
    for name in base.tensors:
        inside = parts.locate(name)
        if inside and inside[0] in gone:
            found[name] = f"layer {inside[0]} is not in the map"
    return found


def _notes(base: Checkpoint, parts: Anatomy, layers: int) -> Iterable[str]:
    yield from base.notes
    if base.bare:
        yield f"a bare file has no config: load it with {layers} layers"
    if parts.extra_layers:
        yield f"{parts.extra_layers} predictor layer(s) after the model's own keep their place"
    if any(path.suffix == ".py" for path in base.carried):
        yield "the model's own code is carried along as it is; look at it before you trust it"


def parse_layers(text: str, *, option: str) -> tuple[int, ...]:
    """Parse `0-23,8-31,5` into layer numbers; ranges include both ends.

    Raises:
        RecipeError: no numbers, or a range that runs backwards.
    """
    layers: list[int] = []
    for item in text.split(","):
        begin, dash, end = (word.strip() for word in item.partition("-"))
        if not NUMBER.fullmatch(begin) or (dash and not NUMBER.fullmatch(end)):
            fact = f"{item.strip()[:40]!r} is neither a layer nor a range of layers"
            raise RecipeError(f"{option} {text[:80]}", fact, "write for instance 0-23,8-31")
        if dash and int(end) < int(begin):
            fact = f"the range {item.strip()} runs backwards"
            raise RecipeError(f"{option} {text[:80]}", fact, f"write {end}-{begin}")
        layers += range(int(begin), int(end or begin) + 1)
    return tuple(layers)
