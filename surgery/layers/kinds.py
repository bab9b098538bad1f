"""Whether layers can change places: each is whole, and the config tells what it is."""

from typing import Any

from surgery.anatomy import RECURSIVE, Anatomy, Stack
from surgery.checkpoint import Checkpoint
from surgery.errors import PlanError
from surgery.layers.config import layer_facts
from surgery.layers.refusals import WRITE_OUT


def check_kinds(base: Checkpoint, parts: Anatomy) -> None:
    """Make sure that layers are whole, and that the config tells apart those built differently.

    Where they are not, the architecture does it by number, and a moved layer would be taken for
    what it is not: its tensors would be missing, or left over.

    Raises:
        PlanError: layers share weights, a layer is spread over several series, or two layers differ
            and the config says the same of both.
    """
    refuse_recursive(base)
    beside = [s.prefix for s in parts.other_stacks if _is_beside(s, parts)]
    if beside:
        fact = f"spreads each layer over several series ({parts.stack.prefix}, {beside[0]}, ...)"
        raise PlanError(base.name, fact, "such an architecture is not supported")
    if base.config is None:
        return
    packed = base.config.get("quantization_config") is not None
    first: dict[tuple[str, ...], tuple[int, frozenset[Any]]] = {}
    for layer, told in enumerate(layer_facts(dict(base.config), parts)):
        built = _build(base, parts, layer, packed=packed)
        other, expected = first.setdefault(told, (layer, built))
        if built != expected:
            name = min(str(rest) for rest, *_ in built ^ expected)
            fact = f"layers {other} and {layer} differ ({name}), and the config does not say why"
            remedy = f"where transformers knows {parts.family}, " + WRITE_OUT
            raise PlanError(base.name, fact, remedy)


def refuse_recursive(base: Checkpoint) -> None:
    """Refuse a model whose layers share weights: a change to one would be a change to others.

    Raises:
        PlanError: it is recursive.
    """
    if base.config is not None and base.config.get("model_type") == RECURSIVE:
        fact = "is a recursive model, whose layers share weights"
        raise PlanError(base.ref, fact, "write it out first: surgery recurse materialize")


def _is_beside(other: Stack, parts: Anatomy) -> bool:
    """Whether another series stands beside the layers, as long as they are (XLM)."""
    same = other.prefix.rpartition(".")[0] == parts.stack.prefix.rpartition(".")[0]
    return same and len(other.layers) == len(parts.stack.layers)


def _build(base: Checkpoint, parts: Anatomy, layer: int, *, packed: bool) -> frozenset[Any]:
    """Return what a layer is made of; a quantised model's layers may be packed in several ways."""
    names = parts.stack.layers[layer]
    if packed:
        return frozenset((rest.rpartition(".")[0],) for rest in names)
    tensors = ((rest, base.tensors[parts.stack.name(layer, rest)]) for rest in names)
    return frozenset((rest, tensor.shape) for rest, tensor in tensors)
