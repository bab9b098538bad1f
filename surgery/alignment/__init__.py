"""Put one model's units where a like model has its own: git re-basin for transformers.

Hidden units of feed-forward layers, attention heads and experts may be exchanged, with the rows
and columns that belong to them, without changing what a model computes. Two models that were
trained apart have learned like units in different places; aligned, they can be averaged.

The residual stream is left alone. It could be permuted too, in all layers and the embedding at
once: that would couple every group with every other, so that none could be matched exactly and
most tensors of the output would change. Groups inside a layer are independent, each is matched
at its optimum, and what is between them keeps its bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from surgery.alignment.arranging import Progress, Work, carry_out
from surgery.alignment.groups import find_groups, heads_of
from surgery.alignment.mixtures import Mixture, find_mixture
from surgery.alignment.slots import Group
from surgery.anatomy import Anatomy, anatomy, dig
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.checkpoint.header import quoted
from surgery.errors import CheckpointError
from surgery.experts import Block, find_blocks
from surgery.layouts import in_layout
from surgery.plan import Plan, Step, TensorSpec, check_plan
from surgery.quantised import dequantised
from surgery.towers import named_like

__all__ = ["Matching", "align", "match_experts"]

REMEDY = "name two models of the same architecture"
MEMORY = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Matching:
    """A model whose experts lie where the reference has its own.

    Attributes:
        checkpoint: its tensors, by views where they are not where they were.
        orders: by mixture, per place the expert that went there.
        facts: for a record: a digest of the orders, and per mixture how many experts moved, and
            the cosine of both models' experts before and after.
    """

    checkpoint: Checkpoint
    orders: Mapping[str, tuple[int, ...]]
    facts: Mapping[str, Any]


def align(
    model: Checkpoint,
    reference: Checkpoint,
    *,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> Plan:
    """Plan to write a model with its units where a reference has like ones.

    Both are read once to find out, which takes a matrix product of each group's tensors. The
    output computes what the model computes, up to the order in which numbers are added.

    Args:
        model: what is written; its layout, config and files stay.
        reference: a model of the same architecture, which is only compared with.
        memory: bytes that comparing may hold.
        progress: called with bytes compared and in all.

    Raises:
        CheckpointError: the two are not of one architecture, or no units of the model are known
            to be free to move.
        PlanError: comparing takes more memory.

    Source: Ainsworth, Hayase and Srinivasa, "Git Re-Basin", arXiv 2209.04836, algorithm 1. The
    residual stream stays; heads move inside their group of keys and values, and never inside
    themselves, where rotary positions tell places apart.
    """
    source = dequantised(model)
    other = _like(source, reference)
    parts = anatomy(source)
    groups, alone = _groups(source, other, parts)
    mixtures = _mixtures(source, other, parts)
    if not groups and not mixtures:
        fact = f"has no units that are known to be free to move: {'; '.join(alone[:3])}"
        raise CheckpointError(model.ref, fact, REMEDY)
    work = Work(groups=tuple(groups), mixtures=tuple(mixtures), units=True)
    found = carry_out(work, (source, other), memory=memory, progress=progress)
    moved = found.tensors(source)
    notes = (*source.notes, *(f"left as it is: {what}" for what in alone))
    return check_plan(
        Plan(
            operation="align",
            parameters={},
            sources=(replace(source, tensors=moved), reference),
            steps=tuple(_step(name, moved[name], source) for name in moved),
            order=tuple(moved),
            config=source.config,
            carried=source.carried,
            dropped=dict.fromkeys(reference.tensors, "of the reference, which is only compared"),
            facts={**found.facts(), "left_alone": alone},
            notes=notes,
        )
    )


def match_experts(
    reference: Checkpoint,
    checkpoint: Checkpoint,
    *,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> Matching:
    """Return a mixture-of-experts model with its experts where the reference has like ones.

    Experts are matched by the router's rows and their own weights; the router's rows and biases
    move with them. The hidden units inside experts stay: `align` moves those too.

    Args:
        reference: a model of the same architecture, in whatever layout.
        checkpoint: what is matched; its layout stays.
        memory: bytes that comparing may hold.
        progress: called with bytes compared and in all.

    Raises:
        CheckpointError: the two are not of one architecture, or there are no experts.
        PlanError: comparing takes more memory.
    """
    other = _like(checkpoint, reference)
    mixtures = _mixtures(checkpoint, other, anatomy(checkpoint))
    if not mixtures:
        raise CheckpointError(checkpoint.ref, "has no experts that are known", REMEDY)
    work = Work(groups=(), mixtures=tuple(mixtures), units=False)
    found = carry_out(work, (checkpoint, other), memory=memory, progress=progress)
    orders = {m.block.prefix: tuple(a.order.tolist()) for m, a in found.mixtures}
    tensors = found.tensors(checkpoint)
    return Matching(
        checkpoint=replace(checkpoint, tensors=tensors), orders=orders, facts=found.facts()
    )


def _like(model: Checkpoint, reference: Checkpoint) -> Checkpoint:
    other = dequantised(reference)
    return in_layout(named_like(other, like=model), like=model)


def _step(name: str, tensor: TensorInfo, source: Checkpoint) -> Step:
    spec = TensorSpec(tensor.dtype, tensor.shape)
    same = tensor == source.tensors[name]
    return Step(inputs=(tensor,), outputs=((name, spec),), why="copy" if same else "permute")


def _text(model: Checkpoint, parts: Anatomy) -> Mapping[str, Any]:
    return dig(model.config or {}, parts.section)


def _groups(model: Checkpoint, other: Checkpoint, parts: Anatomy) -> tuple[list[Group], list[str]]:
    """Return the dense groups of all layers, and what is left alone, each thing told once."""
    width = model.tensors[parts.embedding].shape[1] if parts.embedding else None
    heads = heads_of(_text(model, parts), width)
    groups: list[Group] = []
    alone: dict[str, None] = {}
    for number, names in parts.stack.layers.items():
        pairs = {}
        for rest in names:
            name = parts.stack.name(number, rest)
            if ".experts." not in f".{rest}":
                pairs[rest] = model.tensors[name], _counterpart(model, other, name)
        found, left = find_groups(f"{parts.stack.prefix}.{number}", pairs, heads)
        groups += found
        alone.update(dict.fromkeys(left))
    return groups, list(alone)


def _counterpart(model: Checkpoint, other: Checkpoint, name: str) -> TensorInfo:
    own, theirs = model.tensors[name], other.tensors.get(name)
    if theirs is None or theirs.shape != own.shape:
        has = "has no" if theirs is None else f"has {list(theirs.shape)} in"
        fact = f"{has} {quoted(name)}, which {model.ref} has of shape {list(own.shape)}"
        raise CheckpointError(other.ref, fact, REMEDY)
    return theirs


def _mixtures(model: Checkpoint, other: Checkpoint, parts: Anatomy) -> list[Mixture]:
    theirs: dict[str, Block] = {block.prefix: block for block in find_blocks(other)}
    text = _text(model, parts)
    found = []
    for block in find_blocks(model):
        for name in sorted(block.names):
            _counterpart(model, other, name)
        found.append(find_mixture(model, other, block, theirs[block.prefix], text))
    return found
