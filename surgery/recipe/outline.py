"""Which tensors of which models make each tensor of the output."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from surgery.checkpoint import TensorInfo
from surgery.errors import PlanError
from surgery.recipe.inputs import Model
from surgery.recipe.lanes import Lane
from surgery.recipe.schema import Source
from surgery.recipe.settings import Position

# Buffers that old checkpoints hold and every model makes anew; they may be missing or left over.
COMPUTED = ("rotary_emb.inv_freq", ".attn.masked_bias", ".attention.masked_bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A tensor of the output.

    Attributes:
        lane: None where it is copied from the donor, outside of what is merged.
        inputs: one per source of the lane, in their order.
        at: where it stands for parameters.
        layer: its layer in the output; None outside.
    """

    name: str
    lane: Lane | None
    inputs: tuple[TensorInfo, ...]
    at: Position
    layer: int | None = None


def is_computed(name: str) -> bool:
    """Whether a tensor is a buffer that every model makes anew."""
    return name.endswith(COMPUTED)


def whole_outputs(lane: Lane, donor: Model, *, belongs: Callable[[str], bool]) -> Iterator[Output]:
    """Yield the outputs of models that are merged with all their layers.

    Args:
        belongs: whether one of the donor's tensors is part of what is merged.

    Raises:
        PlanError: models differ in depth, or a tensor is missing in one or more in another.
    """
    _check_depths(lane, donor)
    names = [name for name in donor.tensors if belongs(name)]
    names += [name for name in _further_heads(lane, donor) if belongs(name)]
    for name in names:
        if is_computed(name) and any(name not in model.tensors for model in lane.models):
            continue
        layer = donor.layer_of(name)
        share = None if layer is None else _share(layer, donor.anatomy.layers)
        inputs = tuple(_found(model, name, donor) for model in lane.models)
        at = Position((name,), share)
        yield Output(name=name, lane=lane, inputs=inputs, at=at, layer=layer)
    _check_extra(lane, donor, belongs)


def _check_depths(lane: Lane, donor: Model) -> None:
    for model in lane.models:
        if model.parts and donor.parts and model.parts.layers != donor.parts.layers:
            fact = f"has {model.parts.layers} layers, and {donor.ref} has {donor.parts.layers}"
            remedy = "merge models of one depth, or choose layers with slices and layer_range"
            raise PlanError(model.ref, fact, remedy)


def _further_heads(lane: Lane, donor: Model) -> Iterable[str]:
    """Name the head where the donor ties it and another model does not."""
    if donor.parts is None or not donor.parts.tied:
        return ()
    return dict.fromkeys(model.head for model in lane.models if model.head)


def _share(layer: int, layers: int) -> float:
    return layer / (layers - 1) if layers > 1 else 1.0


def _found(model: Model, name: str, donor: Model) -> TensorInfo:
    found = model.find(name)
    if found is None:
        fact = f"has no tensor {name!r}, which {donor.ref} has"
        raise PlanError(model.ref, fact, "merge models of one architecture")
    return found


def _check_extra(lane: Lane, donor: Model, belongs: Callable[[str], bool]) -> None:
    """Refuse tensors that only some models have: nothing would become of them."""
    for model in lane.models:
        used = {found.name for name in donor.tensors if (found := model.find(name))}
        for name in model.tensors:
            mine = name in used or is_computed(name) or name == model.head
            if not mine and belongs(name):
                fact = f"has a tensor {name!r}, which {donor.ref} has not"
                raise PlanError(model.ref, fact, "merge models of one architecture")


def sliced_outputs(
    lanes: Sequence[Lane], donor: Model, *, belongs: Callable[[str], bool]
) -> Iterator[Output]:
    """Yield the outputs of slices: layers in their new order, the rest around them.

    Embeddings come from the first slice's models, all else outside of the layers (the last
    norm, the head) from the last slice's.

    Raises:
        PlanError: a layer that there is not, or models that do not fit together.
    """
    parts = donor.anatomy
    outside = [n for n in donor.tensors if belongs(n) and parts.locate(n) is None]
    outside += [n for n in _further_heads(lanes[-1], donor) if belongs(n)]
    first = [name for name in outside if parts.part(name) == "embedding"]
    yield from _outside(first, lanes[0], donor)
    at = 0
    for lane in lanes:
        for offset, count in _offsets(lane):
            yield from _layer(lane, donor, at, offset, count)
            at += 1
    for extra in range(parts.extra_layers):
        yield from _predictor(lanes[-1], donor, at + extra, extra)
    yield from _outside([name for name in outside if name not in first], lanes[-1], donor)


def _offsets(lane: Lane) -> Iterator[tuple[int, int]]:
    """Yield the number of each layer within the slice, and how many there are."""
    counts = {source.model: _count(source, model) for source, model in lane.pairs}
    count = counts[lane.sources[0].model]
    if set(counts.values()) != {count}:
        told = ", ".join(f"{n} of {model}" for model, n in counts.items())
        fact = f"has sources of different length ({told})"
        raise PlanError(lane.slice.place, fact, "give each layer_range the same number of layers")
    yield from ((offset, count) for offset in range(count))


def _count(source: Source, model: Model) -> int:
    begin, end = source.layers or (0, 0)
    layers = model.anatomy.layers
    if end > layers:
        fact = f"layer_range [{begin}, {end}] asks for layer {end - 1}, but {model.ref} has layers"
        remedy = f"the end is not included: [{min(begin, layers - 1)}, {layers}] ends with the last"
        raise PlanError(source.place, f"{fact} 0 to {layers - 1}", remedy)
    return end - begin


@dataclass(frozen=True, slots=True)
class _Old:
    """A layer of a source: the names in it, without its number."""

    model: Model
    number: int

    @property
    def names(self) -> tuple[str, ...]:
        return self.model.anatomy.stack.layers.get(self.number, ())

    def tensor(self, rest: str) -> TensorInfo:
        return self.model.tensors[self.model.anatomy.stack.name(self.number, rest)]


def _layer(lane: Lane, donor: Model, at: int, offset: int, count: int) -> Iterator[Output]:
    olds = [_Old(model, source.layers[0] + offset) for source, model in lane.pairs if source.layers]
    for output in _joined(lane, donor, at, olds):
        share = Position((output.name,), _share(offset, count))
        yield replace(output, at=share, layer=at)


def _predictor(lane: Lane, donor: Model, at: int, extra: int) -> Iterator[Output]:
    olds = [_Old(model, model.anatomy.layers + extra) for model in lane.models]
    yield from _joined(lane, donor, at, olds)


def _joined(lane: Lane, donor: Model, at: int, olds: Sequence[_Old]) -> Iterator[Output]:
    lead = olds[lane.lead]
    for old in olds:
        differing = {*old.names} ^ {*lead.names}
        if told := sorted(rest for rest in differing if not is_computed(rest)):
            fact = f"layer {old.number} is not built like layer {lead.number} of {lead.model.ref}"
            raise PlanError(old.model.ref, f"{fact} ({told[0]})", "merge layers of one kind")
    for rest in lead.names:
        if all(rest in old.names for old in olds):
            name = donor.anatomy.stack.name(at, rest)
            inputs = tuple(old.tensor(rest) for old in olds)
            yield Output(name=name, lane=lane, inputs=inputs, at=Position((name,), None))


def _outside(names: Sequence[str], lane: Lane, donor: Model) -> Iterator[Output]:
    for name in names:
        inputs = tuple(_found(model, name, donor) for model in lane.models)
        yield Output(name=name, lane=lane, inputs=inputs, at=Position((name,), None))
