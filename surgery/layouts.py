"""Show one mixture of experts in the layout of another: split, fused, transposed by views."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import Checkpoint, TensorInfo, make_view
from surgery.checkpoint.header import quoted
from surgery.checkpoint.view import ReadRows
from surgery.errors import CheckpointError
from surgery.experts import Block, Store, find_blocks
from surgery.pieces import Recent, rows_from, run_of_rows

if TYPE_CHECKING:
    import torch

# Routers that are spelt differently with the layout (Granite).
ROUTERS = ((".router.layer.", ".router."), (".router.", ".router.layer."))
EXPERT = re.compile(r"\.experts\.\d+\.")
Part = tuple[Store, str]  # where a role lies
KEPT = 4  # experts' matrices held at once, for rows that lie across them


def in_layout(checkpoint: Checkpoint, *, like: Checkpoint) -> Checkpoint:
    """Return the checkpoint with its experts named and laid out as another checkpoint has them.

    Experts may lie one by one (`experts.3.gate_proj.weight`), fused (`experts.gate_up_proj`,
    gate above up), fused with the inputs first (Llama 4, Qwen3-VL) or with the rows of gate and
    up alternating (GPT-OSS). What belongs to a mixture beside its experts is renamed with it.
    A layer that the other has not is laid out as the other's first mixture is. A checkpoint that
    is laid out so already comes back as it is, as does one where either has no experts.

    Raises:
        CheckpointError: a layer that is laid out otherwise has another number of experts than
            the other's, or an expert's part has no counterpart.
    """
    ours = find_blocks(checkpoint)
    theirs = find_blocks(like) if ours else ()
    if not theirs:
        return checkpoint
    pairs = {block.prefix: (block, _partner(checkpoint, like, block, theirs)) for block in ours}
    if all(_same(block, other) for block, other in pairs.values()):
        return checkpoint
    recent = Recent(KEPT)
    home = {name: block.prefix for block in ours for name in block.names}
    done: set[str] = set()
    tensors: dict[str, TensorInfo] = {}
    for name, tensor in checkpoint.tensors.items():
        prefix = home.get(name)
        if prefix is None:
            new = _renamed(name, pairs, like)
            tensors[new] = tensor if new == name else replace(tensor, name=new)
        elif prefix not in done:
            done.add(prefix)
            block, other = pairs[prefix]
            made = [v for store in other.stores for v in _views(checkpoint, block, store, recent)]
            tensors.update({tensor.name: tensor for tensor in made})
    note = f"experts are read in the layout of {like.ref}"
    return replace(checkpoint, tensors=tensors, notes=(*checkpoint.notes, note))


def _partner(
    checkpoint: Checkpoint, like: Checkpoint, block: Block, theirs: tuple[Block, ...]
) -> Block:
    """Return the other's mixture in the same layer, or its first one as a pattern for the layer."""
    fitting = [other for other in theirs if other.place == block.place]
    same = [other for other in fitting if other.prefix == block.prefix] or fitting
    if not same:
        return _as_pattern(theirs[0], block)
    other = same[0]
    if len(same) > 1 or (other.experts != block.experts and not _same(block, other)):
        has = f"{other.experts} experts" if len(same) == 1 else f"{len(same)} such mixtures"
        fact = f"{quoted(block.prefix)} has {block.experts} experts, its layer in {like.ref} {has}"
        raise CheckpointError(checkpoint.ref, fact, "name models of the same architecture")
    return other


def _as_pattern(other: Block, block: Block) -> Block:
    """Return the mixture that a layer would have in the other's layout: names and order alone."""
    stack, layer = block.place
    prefix = f"{stack}.{layer}{_tail(other)}"
    stores = []
    for store in other.stores:
        names = [prefix + tensor.name[len(other.prefix) :] for tensor in store.tensors]
        if not store.fused:
            names = [EXPERT.sub(f".experts.{n}.", names[0]) for n in range(block.experts)]
        tensors = tuple(replace(store.tensors[0], name=name) for name in names)
        stores.append(replace(store, tensors=tensors))
    return Block(prefix=prefix, stores=tuple(stores))


def _tail(block: Block) -> str:
    """Return what stands behind the layer's number."""
    stack, layer = block.place
    return block.prefix[len(f"{stack}.{layer}") :]


def _same(block: Block, other: Block) -> bool:
    """Whether two mixtures are laid out alike, whatever their layers and number of experts."""

    def told(of: Block) -> list[Any]:
        names = ((s, s.tensors[0].name[len(of.prefix) :]) for s in of.stores)
        return sorted((EXPERT.sub("*", n), s.inputs_first, s.interleaved) for s, n in names)

    return _tail(block) == _tail(other) and told(block) == told(other)


def _renamed(name: str, pairs: Mapping[str, tuple[Block, Block]], like: Checkpoint) -> str:
    """Return what a tensor beside the experts is called in the other's mixture."""
    words = name.split(".")
    prefixes = (".".join(words[:size]) for size in range(len(words) - 1, 0, -1))
    prefix = next((prefix for prefix in prefixes if prefix in pairs), None)
    if prefix is None:
        return name
    new = pairs[prefix][1].prefix + name[len(prefix) :]
    spellings = (new.replace(old, other) for old, other in ROUTERS)
    return new if new in like.tensors else next((n for n in spellings if n in like.tensors), new)


def _views(checkpoint: Checkpoint, block: Block, target: Store, recent: Recent) -> list[TensorInfo]:
    """Return the tensors of one store of the target layout."""
    stores = [block.find(role, bias=target.bias) for role in target.roles]
    sources = tuple(store for store in stores if store is not None)
    if len(sources) < len(stores):
        fact = f"{quoted(block.prefix)} has nothing to make {quoted(target.tensors[0].name)} of"
        raise CheckpointError(checkpoint.ref, fact, "name models of the same architecture")
    experts = range(block.experts)
    groups = [tuple(experts)] if target.fused else [(expert,) for expert in experts]
    return [
        _made(name, sources, target, group, recent)
        for name, group in zip((t.name for t in target.tensors), groups, strict=True)
    ]


def _made(
    name: str, sources: tuple[Store, ...], target: Store, experts: tuple[int, ...], recent: Recent
) -> TensorInfo:
    alone = _run(sources[0], target, experts[0]) if not target.fused else None
    if alone is not None:
        return replace(alone, name=name)
    whole = {store.expert(n).name: store.expert(n) for store in sources for n in experts}
    dtypes = {tensor.dtype for tensor in whole.values()}
    turned = any(store.inputs_first != target.inputs_first for store in sources)
    layout = Layout(sources=sources, target=target, experts=experts, recent=recent)
    return make_view(
        name,
        dtype=dtypes.pop() if len(dtypes) == 1 else "F32",
        shape=layout.shape,
        stored=whole.values(),
        make=layout.vectors if target.bias else layout.rows,
        why="lay out experts",
        key=f"{target.inputs_first} {target.interleaved} {sources[0].inputs_first}",
        held=KEPT * max(tensor.nbytes for tensor in whole.values()) if turned else 0,
    )


def _run(source: Store, target: Store, expert: int) -> TensorInfo | None:
    """Return one role of one expert where it lies in one piece: it can be copied as bytes."""
    if source.inputs_first or source.interleaved or source.bias:
        return source.expert(expert) if source.bias and not source.fused else None
    whole, (outputs, *_) = source.expert(expert), source.shape
    if len(source.roles) == 1:
        return whole
    start = source.roles.index(target.roles[0]) * outputs
    return run_of_rows(whole, start, outputs, label=target.roles[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Makes the rows of one tensor of the target layout.

    Attributes:
        sources: where each role of the target lies, in its order.
        experts: those that the tensor holds.
        recent: keeps matrices that are read across.
    """

    sources: tuple[Store, ...]
    target: Store
    experts: tuple[int, ...]
    recent: Recent

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        outputs, *inputs = self.sources[0].shape
        own = (outputs * len(self.sources), *inputs)
        own = own[::-1] if self.target.inputs_first else own
        return (len(self.experts), *own) if self.target.fused else own

    @property
    def _parts(self) -> list[Part]:
        return list(zip(self.sources, self.target.roles, strict=True))

    def rows(self, read: ReadRows, start: int, count: int) -> "torch.Tensor":
        """Return rows of a tensor of matrices."""
        import torch

        one = self._inputs if self.target.inputs_first else self._outputs
        pieces = rows_from(start, count, self.shape[-2])
        return torch.cat([one(read, self.experts[n], at, size) for n, at, size in pieces])

    def vectors(self, read: ReadRows, start: int, count: int) -> "torch.Tensor":
        """Return rows of a tensor of biases: whole experts, or numbers of a single one."""
        import torch

        if not self.target.fused:
            return self._bias(read, self.experts[0])[start : start + count]
        return torch.stack([self._bias(read, n) for n in self.experts[start : start + count]])

    def _bias(self, read: ReadRows, expert: int) -> "torch.Tensor":
        return self._joined([_vector(read, part, expert) for part in self._parts], 0)

    def _outputs(self, read: ReadRows, expert: int, start: int, count: int) -> "torch.Tensor":
        """Return consecutive rows [outputs, inputs] of one expert."""
        import torch

        size, roles = self.sources[0].shape[0], len(self.sources)
        parts = self._parts
        if self.target.interleaved:
            first, last = start // roles, (start + count - 1) // roles + 1
            found = [self._part(read, part, expert, first, last - first) for part in parts]
            return self._joined(found, 0)[start - first * roles :][:count]
        pieces = rows_from(start, count, size)
        return torch.cat([self._part(read, parts[n], expert, at, k) for n, at, k in pieces])

    def _inputs(self, read: ReadRows, expert: int, start: int, count: int) -> "torch.Tensor":
        """Return consecutive rows [inputs, outputs] of one expert."""
        found = [self._across(read, part, expert, start, count) for part in self._parts]
        return self._joined(found, 1)

    def _joined(self, parts: "list[torch.Tensor]", axis: int) -> "torch.Tensor":
        import torch

        if self.target.interleaved:
            return torch.stack(parts, axis + 1).flatten(axis, axis + 1)
        return torch.cat(parts, axis)

    def _part(
        self, read: ReadRows, part: Part, expert: int, start: int, count: int
    ) -> "torch.Tensor":
        """Return rows of one role, [count, inputs]."""
        store, role = part
        if store.inputs_first:
            columns = _lines(store, role, start, count)
            return self._whole(read, store, expert)[:, columns].T
        lines = _lines(store, role, start, count)
        found: torch.Tensor = read(store.expert(expert), lines.start, lines.stop - lines.start)
        return found[:: lines.step]

    def _across(
        self, read: ReadRows, part: Part, expert: int, start: int, count: int
    ) -> "torch.Tensor":
        """Return inputs of one role, [count, outputs]."""
        store, role = part
        lines = _lines(store, role, 0, store.shape[0])
        if store.inputs_first:
            found: torch.Tensor = read(store.expert(expert), start, count)
            return found[:, lines]
        return self._whole(read, store, expert)[lines, start : start + count].T

    def _whole(self, read: ReadRows, store: Store, expert: int) -> "torch.Tensor":
        tensor = store.expert(expert)
        key = tensor.file, tensor.name
        found: torch.Tensor = self.recent.get(key, lambda: read(tensor, 0, tensor.shape[0]))
        return found


def _lines(store: Store, role: str, start: int, count: int) -> slice:
    """Return where outputs of a role lie among those of an expert."""
    place, roles, size = store.roles.index(role), len(store.roles), store.shape[0]
    if store.interleaved:
        first = start * roles + place
        return slice(first, first + (count - 1) * roles + 1, roles)
    return slice(place * size + start, place * size + start + count)


def _vector(read: ReadRows, part: Part, expert: int) -> "torch.Tensor":
    store, role = part
    tensor = store.expert(expert)
    flat: torch.Tensor = read(tensor, 0, 1 if store.fused else tensor.shape[0]).reshape(-1)
    return flat[_lines(store, role, 0, store.shape[0])]
