"""Steps and names of a mixture: experts from feed-forwards, a router for each block."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from growth.upcycle.dense import NO_TENSOR, Dense
from growth.upcycle.layout import FEED_FORWARD, Layout
from growth.upcycle.numbers import altered, random_router, same
from surgery.checkpoint import TensorInfo
from surgery.plan import Step, TensorSpec

SHARED_EXPERT = "shared_expert"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What makes the experts of one model differ: neurons drawn anew, and noise."""

    neurons: int = 0
    noise: float = 0.0
    seed: int = 0

    def __bool__(self) -> bool:
        return bool(self.neurons or self.noise)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """A mixture in terms of dense models.

    Attributes:
        dense: the model that gives config and names.
        experts: the model that each expert comes from.
        sparse: the layers that become mixtures.
    """

    dense: Dense
    experts: tuple[Dense, ...]
    layout: Layout
    sparse: tuple[int, ...]

    def name(self, layer: int, rest: str) -> str:
        """Return the full name of a tensor of a layer."""
        return self.dense.parts.stack.name(layer, rest)

    def stored(self, expert: int, layer: int, projection: str) -> TensorInfo:
        """Return what an expert's projection is made from."""
        return self.experts[expert].source.tensors[self.name(layer, f"mlp.{projection}.weight")]


def kept_names(mixture: Mixture) -> Iterator[str]:
    """Yield the names of tensors that keep their name, in the order of the dense model's file."""
    parts = mixture.dense.parts
    becoming = {f"mlp.{each}.weight" for each in FEED_FORWARD}
    for name in mixture.dense.source.tensors:
        layer, rest = parts.locate(name) or (-1, name)
        if rest != NO_TENSOR and not (layer in mixture.sparse and rest in becoming):
            yield name


def ordered_names(mixture: Mixture) -> tuple[str, ...]:
    """Return all names of the result: each block stands where its layer's own tensors end."""
    parts, kept = mixture.dense.parts, list(kept_names(mixture))
    last = {inside[0]: name for name in kept if (inside := parts.locate(name))}
    names: list[str] = []
    for name in kept:
        names.append(name)
        layer = (parts.locate(name) or (-1, ""))[0]
        if layer in mixture.sparse and last[layer] == name:
            names += _block_names(mixture, layer)
    return tuple(names)


def _block_names(mixture: Mixture, layer: int) -> list[str]:
    layout = mixture.layout
    rest = [layout.router]
    rest += [layout.expert(n, each) for n in range(len(mixture.experts)) for each in FEED_FORWARD]
    rest += [name for name, _ in _absent_shared(mixture)]
    return [mixture.name(layer, each) for each in rest]


def expert_steps(mixture: Mixture, change: Change) -> Iterator[Step]:
    """Yield the steps that make all experts; copies of one tensor are one step, read once."""
    for layer in mixture.sparse:
        for projection in FEED_FORWARD:
            if change:
                numbers = range(len(mixture.experts))
                yield from (_altered(mixture, layer, projection, n, change) for n in numbers)
            else:
                yield from _copies(mixture, layer, projection)


def _copies(mixture: Mixture, layer: int, projection: str) -> Iterator[Step]:
    grouped: dict[tuple[object, str], tuple[TensorInfo, list[str]]] = {}
    for number in range(len(mixture.experts)):
        tensor = mixture.stored(number, layer, projection)
        name = mixture.name(layer, mixture.layout.expert(number, projection))
        grouped.setdefault((tensor.file, tensor.name), (tensor, []))[1].append(name)
    for tensor, names in grouped.values():
        yield from kept_steps(tensor, names, mixture.dense.dtype, why="copy to experts")


def kept_steps(
    tensor: TensorInfo, names: Sequence[str], dtype: str, *, why: str = "copy"
) -> Iterator[Step]:
    """Yield what writes a tensor under some names: one step, or, rounded to a dtype, one each."""
    outputs = tuple((name, TensorSpec(dtype, tensor.shape)) for name in names)
    if dtype == tensor.dtype:
        yield Step(inputs=(tensor,), outputs=outputs, why=why)
        return
    for output in outputs:
        yield Step(
            inputs=(tensor,),
            outputs=(output,),
            fn=same,
            elementwise=True,
            plain=True,
            why=f"{why}, rounded",
        )


def _altered(mixture: Mixture, layer: int, projection: str, expert: int, change: Change) -> Step:
    tensor = mixture.stored(expert, layer, projection)
    name = mixture.name(layer, mixture.layout.expert(expert, projection))
    fn = partial(
        altered,
        width=mixture.dense.width,
        count=change.neurons,
        neurons_first=projection != "down_proj",
        noise=change.noise,
        seed=change.seed,
        layer=layer,
        expert=expert,
        name=name,
    )
    return Step(
        inputs=(tensor,),
        outputs=((name, TensorSpec(tensor.dtype, tensor.shape)),),
        fn=fn,
        passes=True,
        rows=True,
        why="start neurons anew" if change.neurons else "add noise",
        key=f"{change.neurons} {change.noise} {change.seed} {layer} {expert}",
    )


def random_routers(mixture: Mixture, *, deviation: float, seed: int) -> Iterator[Step]:
    """Yield the steps that draw every block's router."""
    shape = (len(mixture.experts), mixture.dense.hidden)
    for layer in mixture.sparse:
        name = mixture.name(layer, mixture.layout.router)
        yield Step(
            outputs=((name, TensorSpec(mixture.dense.dtype, shape)),),
            fn=partial(random_router, shape=shape, deviation=deviation, seed=seed, name=name),
            why="draw routers",
            key=f"{deviation} {seed}",
        )


def shared_expert_steps(mixture: Mixture) -> Iterator[Step]:
    """Yield zeros for the shared expert of a layout that cannot be without one."""
    for layer in mixture.sparse:
        for rest, shape in _absent_shared(mixture):
            spec = TensorSpec(mixture.dense.dtype, shape)
            yield Step(outputs=((mixture.name(layer, rest), spec),), why="zero")


def _absent_shared(mixture: Mixture) -> list[tuple[str, tuple[int, ...]]]:
    """Return the tensors of a shared expert of one neuron.

    All are zero: nothing is added, and no gradient ever changes that. Of no neuron at all, torch
    warns each time that the model is built.
    """
    if not mixture.layout.shared:
        return []
    hidden, block = mixture.dense.hidden, mixture.layout.block
    expert = f"{block}.{SHARED_EXPERT}"
    return [
        (f"{expert}.gate_proj.weight", (1, hidden)),
        (f"{expert}.up_proj.weight", (1, hidden)),
        (f"{expert}.down_proj.weight", (hidden, 1)),
        (f"{block}.{SHARED_EXPERT}_gate.weight", (1, hidden)),
    ]


def dropped_tensors(mixture: Mixture) -> dict[str, str]:
    """Return the tensors that a mixture has no use for, with the reason."""
    own = mixture.dense.source.tensors
    return {n: "is computed, not stored" for n in own if n.endswith(f".{NO_TENSOR}")}


def figures(mixture: Mixture, *, top_k: int) -> dict[str, int]:
    """Return how many numbers the result has, and how many of them a token meets."""
    own = mixture.dense.source.tensors
    rest = sum(own[name].numel for name in kept_names(mixture))
    expert = 3 * mixture.dense.hidden * mixture.dense.width
    router = len(mixture.experts) * mixture.dense.hidden
    blocks = len(mixture.sparse)
    more = sum(a * b for _, (a, b) in _absent_shared(mixture))
    total = rest + blocks * (len(mixture.experts) * expert + router + more)
    return {"parameters": total, "active": total - blocks * (len(mixture.experts) - top_k) * expert}
