"""Match the experts of two mixtures, and the hidden units inside matched experts."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from surgery.alignment.gains import Matched, Tick, match
from surgery.alignment.moved import reordered, stacked
from surgery.alignment.slots import Group, Slot, Spread
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.checkpoint.header import quoted
from surgery.checkpoint.view import ReadRows
from surgery.errors import CheckpointError
from surgery.experts import DOWN, Block, Store

if TYPE_CHECKING:
    import numpy as np

    Order = np.ndarray[Any, np.dtype[np.int64]]

ROUTER = re.compile(r"^(gate|router)(\.|$)|(^|\.)(e_score_correction_bias|expert_bias)$")
BY_EXPERT = re.compile(r"bias|expert")
SHARED = re.compile(r"^shared_expert")
ROUNDS = 100  # of coordinate ascent
ENOUGH = 1e-12  # gain below which it ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """One layer's experts in both models, laid out alike.

    Attributes:
        block: of the model that is aligned.
        other: of the reference.
        routers: what is told per expert beside the experts: rows, biases.
        groups: experts that are routed to together (DeepSeek), 1 where there are none.
    """

    block: Block
    other: Block
    routers: tuple[Slot, ...]
    groups: int

    @property
    def nbytes(self) -> int:
        """Bytes that one comparison of the experts reads."""
        tensors = [t for b in (self.block, self.other) for s in b.stores for t in s.tensors]
        return sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arranged:
    """How a mixture is matched.

    Attributes:
        order: per place the expert of the model that goes there.
        units: per expert of the model the order of its hidden units; None where they stay.
        before, after: cosine of the two mixtures, as they lie and matched.
    """

    order: "Order"
    units: "tuple[Order | None, ...]"
    before: float
    after: float


def find_mixture(
    model: Checkpoint, reference: Checkpoint, block: Block, other: Block, text: Mapping[str, Any]
) -> Mixture:
    """Pair one layer's experts, and find what else is told per expert.

    Raises:
        CheckpointError: a tensor of the mixture that may or may not follow the experts.
    """
    inside = f"{block.prefix}."
    slots = []
    for name, tensor in model.tensors.items():
        if name.startswith(inside) and name not in block.names:
            rest = name[len(inside) :]
            axis = None if SHARED.search(rest) else _axis(model, rest, tensor, block.experts, text)
            theirs = reference.tensors.get(name)
            if axis is not None and (theirs is None or theirs.shape != tensor.shape):
                fact = f"has no {quoted(name)} of shape {list(tensor.shape)}"
                raise CheckpointError(reference.ref, fact, "name models of the same architecture")
            if axis is not None and theirs is not None:
                slots.append(Slot(tensor=tensor, other=theirs, axis=axis))
    groups = text.get("n_group")
    groups = groups if type(groups) is int and groups > 0 else 1
    return Mixture(block=block, other=other, routers=tuple(slots), groups=groups)


def _axis(
    model: Checkpoint, rest: str, tensor: TensorInfo, experts: int, text: Mapping[str, Any]
) -> int | None:
    """Return the axis of a tensor that runs over experts; None where none does."""
    if experts not in tensor.shape:
        return None
    known = ROUTER.search(rest) is not None and tensor.dtype.startswith(("F", "BF"))
    twofold = experts == text.get("hidden_size") and len(tensor.shape) == 1
    if known and tensor.shape[0] == experts and not (twofold and not BY_EXPERT.search(rest)):
        return 0
    if known and tensor.shape == (1, experts):
        return 1
    fact = f"{quoted(tensor.name)} of shape {list(tensor.shape)} is not known to follow the experts"
    raise CheckpointError(model.ref, fact, "its experts cannot be matched")


def arrange(mixture: Mixture, read: ReadRows, tick: Tick, *, units: bool) -> Arranged:
    """Match experts by routers' rows and their weights; with `units`, what is inside them too.

    The router's rows and each kind of weight count by their cosine, or the router would be
    drowned. With `units` experts and their hidden units are matched in turn until nothing is
    gained, at most 100 times.
    """
    import numpy as np

    count = mixture.block.experts
    order, before = np.arange(count), None
    inside: list[Order | None] = [None] * count
    for _ in range(ROUNDS):
        found = match(_experts(mixture, order, inside), read, tick)
        before = found.before if before is None else before
        order = order[found.fine]
        after, gained = found.after, 0.0
        for place, expert in enumerate(order.tolist() if units else ()):
            within = match(_units(mixture, place, expert, inside[expert], found), read, _ignore)
            gained += within.gain
            if within.gain > 0:
                old = inside[expert]
                inside[expert] = within.fine if old is None else old[within.fine]
        if gained <= ENOUGH:
            break
    return Arranged(order=order, units=tuple(inside), before=before or 0.0, after=after)


def _ignore(_: int) -> None:
    """Progress is told by experts."""


def _experts(mixture: Mixture, order: "Order", inside: "Sequence[Order | None]") -> Group:
    """Return the experts as units, as they are arranged so far."""
    block, other = mixture.block, mixture.other
    rows = [_arranged(slot, order) for slot in mixture.routers if len(slot.tensor.shape) > 1]
    weights = [
        Spread(
            tensors=tuple(_inside(store, expert, inside[expert]) for expert in order.tolist()),
            others=tuple(theirs.expert(n) for n in range(other.experts)),
        )
        for store, theirs in _stores(block, other)
    ]
    return Group(
        name=f"{block.prefix}.experts",
        outer=mixture.groups,
        inner=block.experts // mixture.groups,
        fine=(*weights, *rows),
        balanced=True,
    )


def _arranged(slot: Slot, order: "Order") -> Slot:
    axes = ("rows", "columns")
    return replace(slot, tensor=reordered(slot.tensor, **{axes[slot.axis]: order}))


def _stores(block: Block, other: Block) -> list[tuple[Store, Store]]:
    """Pair the weights of both mixtures."""
    own = [store for store in block.stores if not store.bias]
    pairs = [(store, other.find(store.roles[0], bias=False)) for store in own]
    return [(store, theirs) for store, theirs in pairs if theirs is not None]


def _units(
    mixture: Mixture, place: int, expert: int, order: "Order | None", found: Matched
) -> Group:
    """Return the hidden units of one expert, as they are arranged so far, as a group."""
    slots: list[Slot] = []
    pairs = _stores(mixture.block, mixture.other)
    for (store, theirs), weight in zip(pairs, found.weights, strict=False):  # routers follow
        tensor = _inside(store, expert, order)
        own = unit_slots(store, tensor, theirs.expert(place))
        slots += [replace(slot, weight=weight) for slot in own]
    name = f"{mixture.block.prefix}.experts.{expert}"
    return Group(name=name, outer=1, inner=_width(mixture.block), fine=tuple(slots))


def _width(block: Block) -> int:
    down = block.find(DOWN, bias=False)
    assert down is not None  # noqa: S101 - checked where blocks are found
    return down.shape[1]


def unit_slots(store: Store, tensor: TensorInfo, other: TensorInfo) -> list[Slot]:
    """Return where hidden units lie in one expert's tensor, or nowhere in the bias of down."""
    roles = len(store.roles)
    down = store.roles == (DOWN,)
    if down and store.bias:
        return []
    size = store.shape[1] if down else store.shape[0]
    across = store.fused if store.bias else down != store.inputs_first
    places = [(n, roles) if store.interleaved else (n * size, 1) for n in range(roles)]
    return [
        Slot(tensor=tensor, other=other, axis=int(across), offset=offset, stride=stride)
        for offset, stride in places
    ]


def _inside(store: Store, expert: int, order: "Order | None") -> TensorInfo:
    """Return one expert's tensor with its hidden units in another order."""
    import numpy as np

    tensor = store.expert(expert)
    if order is None:
        return tensor
    axes: dict[str, Order] = {}
    for slot in unit_slots(store, tensor, tensor):
        key = ("rows", "columns")[slot.axis]
        slot.move(axes.setdefault(key, np.arange(tensor.shape[slot.axis])), order)
    return reordered(tensor, **axes)


def arranged_tensors(mixture: Mixture, found: Arranged) -> dict[str, TensorInfo]:
    """Return the tensors of a mixture, by name, with experts and units where they belong."""
    made: dict[str, TensorInfo] = {}
    for store in mixture.block.stores:
        parts = [_inside(store, expert, found.units[expert]) for expert in found.order.tolist()]
        if not store.fused:
            named = zip(store.tensors, parts, strict=True)
            made.update({old.name: replace(new, name=old.name) for old, new in named})
        elif not _unmoved(found):
            whole = store.tensors[0]
            made[whole.name] = stacked(whole.name, parts, whole.shape)
    routers = [_arranged(slot, found.order).tensor for slot in mixture.routers]
    return made | {tensor.name: tensor for tensor in routers}


def _unmoved(found: Arranged) -> bool:
    import numpy as np

    own = found.order == np.arange(len(found.order))
    return bool(own.all()) and all(order is None for order in found.units)
