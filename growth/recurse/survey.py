"""What of a model is tied, what stays per depth, and whether it can be made recursive at all."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from growth.depth import SCALABLE
from growth.recurse.loops import Init, Loops, Scheme, lay_loops
from growth.stock import check_stock
from surgery.anatomy import RECURSIVE, Anatomy, anatomy
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.errors import PlanError
from surgery.layers.kinds import check_kinds
from surgery.lora.modules import MATRIX, NOT_LINEAR

PREFIX = "model.layers"  # of the decoders that the model class builds
WEIGHT = ".weight"
MIXTURE = re.compile(r"(^|\.)(router|gate|experts)(\.|$)")  # tied, but without factors


@dataclass(frozen=True, slots=True, kw_only=True)
class Looped:
    """A model, and how its layers are to be tied; names are those within a layer.

    Attributes:
        linears: weights of linear layers, experts and routers: tied.
        gains: vectors (norms, biases): held per depth, or tied as well.
        tie_norms: whether the latter.
    """

    base: Checkpoint
    parts: Anatomy
    loops: Loops
    linears: tuple[str, ...]
    gains: tuple[str, ...]
    tie_norms: bool

    @property
    def config(self) -> dict[str, Any]:
        """The model's config."""
        return dict(self.base.config or {})

    @property
    def per_depth(self) -> tuple[str, ...]:
        """What every depth holds for itself."""
        return () if self.tie_norms else self.gains

    @property
    def dtype(self) -> str:
        """What the linear layers are stored as, by the first of them."""
        return self.tensor(0, self.linears[0]).dtype

    def name(self, depth: int, rest: str) -> str:
        """Return the full name of a tensor of a depth."""
        return self.parts.stack.name(depth, rest)

    def tensor(self, depth: int, rest: str) -> TensorInfo:
        """Return a tensor of a depth."""
        return self.base.tensors[self.name(depth, rest)]

    def inputs(self, block: int, rest: str) -> tuple[TensorInfo, ...]:
        """Return a tensor at all depths that run a block."""
        return tuple(self.tensor(depth, rest) for depth in self.loops.depths(block))

    def modules(self) -> Iterator[tuple[int, str]]:
        """Yield every block with every linear weight in it."""
        for block in range(self.loops.blocks):
            yield from ((block, rest) for rest in self.linears)

    def outside(self) -> tuple[list[str], list[str]]:
        """Return the names of tensors outside of the layers: before them, and behind."""
        found = [name for name in self.base.tensors if self.parts.locate(name) is None]
        before = [name for name in found if name == self.parts.embedding]
        return before, [name for name in found if name not in before]


def survey(
    base: Checkpoint,
    *,
    blocks: int,
    scheme: Scheme,
    init: Init,
    tie_norms: bool,
    factors: bool,
) -> Looped:
    """Find what is to be tied.

    Args:
        factors: linear layers are to get low-rank factors, which experts cannot have: they are
            one tensor once they are loaded.

    Raises:
        RecipeError: the loops do not fit the layers.
        PlanError: the model cannot be made recursive, with the reason.
    """
    _check_model(base)
    parts = anatomy(base)
    _check_parts(base, parts, factors=factors)
    loops = lay_loops(parts.layers, blocks=blocks, scheme=scheme, init=init)
    check_kinds(base, parts)
    _check_alike(base, parts)
    names = parts.stack.layers[0]
    linears = tuple(n for n in names if _is_tied(base.tensors[parts.stack.name(0, n)], n))
    _check_rest(base, parts, [n for n in names if n not in linears])
    return Looped(
        base=base,
        parts=parts,
        loops=loops,
        linears=linears,
        gains=tuple(n for n in names if n not in linears),
        tie_norms=tie_norms,
    )


def _check_model(base: Checkpoint) -> None:
    """Refuse what is no plain decoder by its config."""
    config = base.config
    if config is None:
        fact = "has no config.json, which would say what model it is"
        raise PlanError(base.ref, fact, "name the directory of a model")
    if config.get("model_type") == RECURSIVE:
        remedy = "write it out first: surgery recurse materialize"
        raise PlanError(base.ref, "is recursive already", remedy)
    check_stock(base, verb="recurse", result="recursive", quantised="so its layers have no mean")


def _check_parts(base: Checkpoint, parts: Anatomy, *, factors: bool) -> None:
    """Refuse what the recursive model class does not build."""
    if parts.experts and factors:
        fact = f"has {parts.experts} experts a layer, which get no factors"
        raise PlanError(base.ref, fact, "tie it without: surgery recurse tie")
    if parts.section or parts.other_stacks:
        fact = "has towers or stacks beside the language model's layers"
        raise PlanError(base.ref, fact, "name a model of text alone")
    if parts.extra_layers:
        raise PlanError(base.ref, "has predictor layers behind its own, which are not tied")
    if parts.stack.prefix != PREFIX:
        fact = f"has its layers at {parts.stack.prefix}, where a recursive model has {PREFIX}"
        raise PlanError(base.ref, fact, "Llama, Mistral, Qwen, Gemma and OLMo 2 have them there")
    if parts.lost_head:
        raise PlanError(base.ref, "promises an output head of its own, but there is none")


def _check_alike(base: Checkpoint, parts: Anatomy) -> None:
    first = {n: base.tensors[parts.stack.name(0, n)] for n in parts.stack.layers[0]}
    for layer, names in parts.stack.layers.items():
        for rest in sorted({*names} ^ {*first}):
            fact = f"is in layer 0 or in layer {layer} alone, so that the two cannot be tied"
            raise PlanError(rest, fact, "tied layers have to be built alike")
        for rest in names:
            here, there = base.tensors[parts.stack.name(layer, rest)], first[rest]
            if (here.shape, here.dtype) != (there.shape, there.dtype):
                told = f"{here.dtype} {list(here.shape)}, in layer 0 {there.dtype}"
                fact = f"is {told} {list(there.shape)}"
                raise PlanError(here.name, fact, "tied layers have to be built alike")
            if here.dtype not in SCALABLE:
                raise PlanError(here.name, f"is stored as {here.dtype}, which is not computed with")


def _is_tied(tensor: TensorInfo, rest: str) -> bool:
    module = rest.removesuffix(WEIGHT)
    known = MIXTURE.search(module) or not NOT_LINEAR.search(module)
    return module != rest and len(tensor.shape) == MATRIX and bool(known)


def _check_rest(base: Checkpoint, parts: Anatomy, names: list[str]) -> None:
    for rest in names:
        shape = base.tensors[parts.stack.name(0, rest)].shape
        if len(shape) >= MATRIX:
            fact = f"has shape {list(shape)} and is no linear layer's, so it is not tied"
            raise PlanError(parts.stack.name(0, rest), fact, "such layers are not supported")
