"""Names of a model with another number of layers, in the order of its source."""

from collections.abc import Iterator, Sequence

from surgery.anatomy import Anatomy
from surgery.checkpoint import Checkpoint
from surgery.errors import PlanError
from surgery.layers.config import layer_facts

Sources = tuple[int, ...]  # of a new layer the old ones that it is the mean of


def names_of(
    base: Checkpoint, parts: Anatomy, layers: Sequence[Sources]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield new names with those of their sources: what lies outside the layers around them."""
    names = list(base.tensors)
    first = next(i for i, name in enumerate(names) if parts.locate(name))
    outside = [name for name in names if parts.locate(name) is None]
    before = set(names[:first]) | {parts.embedding}
    yield from ((name, (name,)) for name in outside if name in before)
    for layer, sources in enumerate(layers):
        for rest in parts.stack.layers[sources[0]]:
            yield parts.stack.name(layer, rest), tuple(parts.stack.name(n, rest) for n in sources)
    yield from ((name, (name,)) for name in outside if name not in before)


def check_alike(base: Checkpoint, parts: Anatomy, layers: Sequence[Sources], remedy: str) -> None:
    """Refuse layers that are to become one, but are built or told differently.

    Raises:
        PlanError: two layers differ in their tensors, or in what the config says of them.
    """
    told = layer_facts(dict(base.config or {}), parts)
    for group in layers:
        kinds = {(told[n], _build(base, parts, n)) for n in group}
        if len(kinds) > 1:
            numbers = " and ".join(str(n) for n in group[:2])
            fact = f"has layers {numbers} of two kinds, whose mean is neither"
            raise PlanError(base.ref, fact, remedy)


def _build(base: Checkpoint, parts: Anatomy, layer: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    names = parts.stack.layers[layer]
    return tuple((rest, base.tensors[parts.stack.name(layer, rest)].shape) for rest in names)


def check_uniform(base: Checkpoint, parts: Anatomy) -> None:
    """Refuse layers of which one is built otherwise than the first, or stands behind the stack.

    Raises:
        PlanError: tensors of other names or shapes, or next-token predictors.
    """
    if parts.extra_layers:
        fact = f"has {parts.extra_layers} predictor layer(s) after its own, unlike those"
        raise PlanError(base.ref, fact, "remove them first")
    first = _build(base, parts, 0)
    odd = next((n for n in range(parts.layers) if _build(base, parts, n) != first), None)
    if odd is not None:
        fact = f"has layers 0 and {odd} that are not built alike"
        raise PlanError(base.ref, fact, "use `surgery stack`, which copies layers")
