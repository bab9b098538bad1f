"""Which axis of which tensor is which dimension of the model: hidden, heads, feed-forward, ..."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from surgery.alignment.groups import (
    GATE_ABOVE_UP,
    INPUTS_FIRST,
    INTO,
    OUT,
    OUTPUTS,
    Heads,
    heads_of,
)
from surgery.anatomy import Anatomy, anatomy, dig
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.errors import PlanError
from surgery.layers.kinds import refuse_recursive

Dimension = Literal[
    "hidden", "ffn", "expert ffn", "shared ffn", "query", "key", "head", "vocab", "experts", "fixed"
]
Side = Literal["in", "out"]
NORM = re.compile(r"(norm|ln_?[0-9f]?)(\.|$)|LayerNorm", re.IGNORECASE)
POSITIONS = re.compile(r"(^|\.)(wpe|position_embeddings|token_type_embeddings)\.weight$")
# Fused maps whose order of rows is known: others use the same names for another order.
FUSED = {"phi3": "qkv_proj", "gpt_neox": "query_key_value", "gpt2": "c_attn"}
NORM_OF_ALL_HEADS = {"olmo2", "olmo3", "olmoe", "flex_olmo"}  # with one head the shapes are alike
QUERIES = {"q_proj", "query"}
KEYS = {"k_proj", "v_proj", "key", "value"}
MIXERS = ("attn", "attention")
MATRIX = 2


@dataclass(frozen=True, slots=True)
class Segment:
    """Indices of one dimension that lie together on an axis: `units` times `width` of them."""

    dimension: Dimension
    units: int
    width: int = 1


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis of a tensor.

    Attributes:
        segments: what lies along it, in order.
        side: `in` where the axis is summed over (inputs of a linear map), else `out`.
    """

    segments: tuple[Segment, ...]
    side: Side = "out"

    @property
    def size(self) -> int:
        """Number of indices."""
        return sum(segment.units * segment.width for segment in self.segments)

    def is_of(self, dimension: Dimension) -> bool:
        """Whether the whole axis is of that dimension."""
        return all(segment.dimension == dimension for segment in self.segments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimensions:
    """The dimensions of a model and where they lie.

    Attributes:
        parts: the anatomy.
        heads: numbers of query heads and key-value heads, and the width of a head.
        hidden: width of the residual stream.
        axes: per tensor name its axes, in the order of its shape.
    """

    parts: Anatomy
    heads: Heads
    hidden: int
    axes: Mapping[str, tuple[Axis, ...]]


def find_dimensions(base: Checkpoint) -> Dimensions:
    """Tell every axis of every tensor of a decoder or BERT-like encoder.

    Raises:
        PlanError: a tensor is not known, so that no width can be changed safely.
    """
    refuse_recursive(base)
    parts = anatomy(base)
    if parts.embedding is None or base.config is None:
        fact = "has no config or no token embedding, so its widths are not known"
        raise PlanError(base.ref, fact, "name a directory with a config.json")
    width = base.tensors[parts.embedding].shape[1]
    # A section has no name of its own where the model is a stock one made over.
    heads = heads_of({"model_type": parts.family, **dig(base.config, parts.section)}, width)
    hidden = heads.hidden or width
    if not heads.queries or not heads.width or heads.queries % max(heads.keys, 1):
        fact = "does not say how many attention heads there are, or of what width"
        raise PlanError(base.root / "config.json", fact)
    found = _Finder(base, parts, heads, hidden)
    axes = {name: found.axes(tensor) for name, tensor in base.tensors.items()}
    return Dimensions(parts=parts, heads=heads, hidden=hidden, axes=MappingProxyType(axes))


@dataclass(frozen=True, slots=True)
class _Finder:
    base: Checkpoint
    parts: Anatomy
    heads: Heads
    hidden: int

    def axes(self, tensor: TensorInfo) -> tuple[Axis, ...]:
        located = self.parts.locate(tensor.name)
        guesses = self._inside(located[1], tensor) if located else self._outside(tensor)
        for axes in guesses:
            if tuple(axis.size for axis in axes) == tensor.shape:
                return axes
        fact = (
            f"has shape {list(tensor.shape)}, whose dimensions are not known in {self.heads.family}"
        )
        raise PlanError(tensor.name, fact, "this architecture's widths cannot be changed")

    def _outside(self, tensor: TensorInfo) -> Iterator[tuple[Axis, ...]]:
        vocab = self.base.tensors[self.parts.embedding or ""].shape[0]
        if tensor.name == self.parts.embedding:
            yield _axis("vocab", vocab), self._stream()
        elif tensor.name == self.parts.head:
            yield _axis("vocab", tensor.shape[0]), self._stream("in")
        elif POSITIONS.search(tensor.name):
            yield _axis("fixed", tensor.shape[0]), self._stream()
        elif NORM.search(tensor.name):
            yield (self._stream(),)
        elif tensor.name.endswith(("lm_head.bias", "predictions.bias", "decoder.bias")):
            yield (_axis("vocab", tensor.shape[0]),)
        elif tensor.name.endswith(("pooler.dense.weight", "transform.dense.weight")):
            yield self._stream(), self._stream("in")
        elif tensor.name.endswith(("pooler.dense.bias", "transform.dense.bias")):
            yield (self._stream(),)
        elif tensor.name.endswith("seq_relationship.weight"):
            yield _axis("fixed", tensor.shape[0]), self._stream("in")
        elif tensor.name.endswith("seq_relationship.bias"):
            yield (_axis("fixed", tensor.shape[0]),)
        elif tensor.name.endswith(("position_ids", "inv_freq")):
            yield tuple(_axis("fixed", size) for size in tensor.shape)

    def _inside(self, rest: str, tensor: TensorInfo) -> Iterator[tuple[Axis, ...]]:
        module, _, leaf = rest.rpartition(".")
        home, _, role = module.rpartition(".")
        if leaf == "inv_freq" or role == "rotary_emb":
            yield (_axis("fixed", tensor.shape[0]),)
        elif role in {"q_norm", "k_norm", "q_layernorm", "k_layernorm"}:
            yield from self._head_norm(role, tensor)
        elif NORM.search(module):
            yield (self._stream(),)
        elif leaf == "sinks":
            yield (_axis("query", self.heads.queries),)
        elif role == "shared_expert_gate":
            yield from self._linear(leaf, _axis("fixed", 1), self._stream("in"))
        elif role in {"gate", "router"} and tensor.shape[0] == self.parts.experts:
            out = _axis("experts", self.parts.experts)
            yield from self._linear(leaf, out, self._stream("in"))
        else:
            yield from self._map(home, role, leaf, tensor)

    def _map(
        self, home: str, role: str, leaf: str, tensor: TensorInfo
    ) -> Iterator[tuple[Axis, ...]]:
        query = _axis("query", self.heads.queries, self.heads.width)
        key = _axis("key", self.heads.keys, self.heads.width)
        mixer = any(word in home for word in MIXERS)
        if mixer and role in QUERIES:
            yield from self._linear(leaf, query, self._stream("in"))
        elif mixer and role in KEYS:
            yield from self._linear(leaf, key, self._stream("in"))
        elif mixer and role == FUSED.get(self.heads.family):
            yield from self._linear(leaf, self._fused(), self._stream("in"))
        elif mixer and role in {*OUTPUTS, "c_proj"}:
            yield from self._linear(leaf, self._stream(), Axis(query.segments, "in"))
        elif role in OUT or ((home.endswith("output") or not home) and role == "dense"):
            yield from self._feed_out(home, leaf, tensor)
        elif role in INTO or role == "dense":
            yield from self._feed_in(home, role, leaf, tensor)

    def _feed_out(self, home: str, leaf: str, tensor: TensorInfo) -> Iterator[tuple[Axis, ...]]:
        swapped = self.heads.family in INPUTS_FIRST
        units = tensor.shape[0 if swapped else -1]
        inner = Axis((Segment(_kind(home), units),), "in")
        yield from self._linear(leaf, self._stream(), inner)

    def _feed_in(
        self, home: str, role: str, leaf: str, tensor: TensorInfo
    ) -> Iterator[tuple[Axis, ...]]:
        swapped = leaf == "weight" and self.heads.family in INPUTS_FIRST
        count = INTO.get(role, 1)
        if count > 1 and self.heads.family not in GATE_ABOVE_UP:
            return
        units = tensor.shape[-1 if swapped else 0] // count
        inner = Axis((Segment(_kind(home), units),) * count)
        yield from self._linear(leaf, inner, self._stream("in"))

    def _linear(self, leaf: str, out: Axis, inside: Axis) -> Iterator[tuple[Axis, ...]]:
        if leaf == "bias":
            yield (out,)
        elif leaf == "weight":
            yield (inside, out) if self.heads.family in INPUTS_FIRST else (out, inside)

    def _fused(self) -> Axis:
        queries, keys, width = self.heads.queries, self.heads.keys, self.heads.width
        if self.heads.family == "gpt_neox":  # each head's query, key and value lie together
            return Axis((Segment("query", queries, 3 * width),))
        shared = Segment("key", keys, width)
        return Axis((Segment("query", queries, width), shared, shared))

    def _head_norm(self, role: str, tensor: TensorInfo) -> Iterator[tuple[Axis, ...]]:
        """A norm over one head, or over all heads at once (OLMo 2)."""
        if self.heads.family not in NORM_OF_ALL_HEADS:
            yield (_axis("head", self.heads.width),)
        own: Dimension = "key" if role.startswith("k") else "query"
        count = self.heads.keys if own == "key" else self.heads.queries
        yield (_axis(own, count, self.heads.width),)
        if len(tensor.shape) == MATRIX:
            yield _axis(own, count), _axis("head", self.heads.width)

    def _stream(self, side: Side = "out") -> Axis:
        return Axis((Segment("hidden", self.hidden),), side)


def _axis(dimension: Dimension, units: int, width: int = 1) -> Axis:
    return Axis((Segment(dimension, units, width),))


def _kind(home: str) -> Dimension:
    if "shared_expert" in home:
        return "shared ffn"
    return "expert ffn" if "experts" in home else "ffn"
