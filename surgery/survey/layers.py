"""Which layers are alike: groups by kind and by the shapes of their tensors."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from surgery.anatomy import RECURSIVE, Anatomy
from surgery.checkpoint import Checkpoint

Signature = tuple[tuple[str, str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """Layers that are alike.

    Attributes:
        kind: what tells them from the others, in words.
        layers: their numbers, such as `0-2, 5`.
        tensors, parameters, bytes: of each such layer.
    """

    kind: str
    layers: str
    count: int
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """The model's own layers.

    Attributes:
        extra: stored layers beyond those that the model runs through.
        prefix: what their names begin with.
        pattern: the sequence of kinds, such as `0-2 dense, 3-60 experts` or
            `4 x (5 sliding_attention, 1 full_attention)`; of a recursive model behind its number of
            blocks.
        groups: the kinds, in the order of their first layers.
    """

    count: int
    extra: int
    prefix: str
    pattern: str
    groups: tuple[LayerGroup, ...]


def describe_layers(checkpoint: Checkpoint, parts: Anatomy, told: Sequence[str] | None) -> Layers:
    """Group the layers by what the config told of them and by their tensors.

    Args:
        told: the kind of each layer by the config, if it says.
    """
    numbers = range(parts.layers)
    signatures = [_signature(checkpoint, parts, n) for n in numbers]
    keys = [(told[n] if told else "", signatures[n]) for n in numbers]
    names = _names(parts, keys)
    groups = {key: [n for n in numbers if keys[n] == key] for key in dict.fromkeys(keys)}
    return Layers(
        count=parts.layers,
        extra=parts.extra_layers,
        prefix=parts.stack.prefix,
        pattern=_loops(checkpoint) + pattern([names[key] for key in keys]),
        groups=tuple(
            _group(checkpoint, parts, names[key], members) for key, members in groups.items()
        ),
    )


def _loops(checkpoint: Checkpoint) -> str:
    """Tell how often a recursive model runs which number of blocks; nothing of others."""
    layer_map = (checkpoint.config or {}).get("layer_map")
    if (checkpoint.config or {}).get("model_type") != RECURSIVE or not isinstance(layer_map, list):
        return ""
    times = set(Counter(layer_map).values())
    often = f"{times.pop()} times" if len(times) == 1 else f"as {len(layer_map)} layers"
    return f"{len(set(layer_map))} blocks run {often}: "


def _signature(checkpoint: Checkpoint, parts: Anatomy, layer: int) -> Signature:
    names = parts.stack.layers[layer]
    tensors = [checkpoint.tensors[parts.stack.name(layer, rest)] for rest in names]
    return tuple((rest, t.dtype, t.shape) for rest, t in zip(names, tensors, strict=True))


def _names(
    parts: Anatomy, keys: Sequence[tuple[str, Signature]]
) -> dict[tuple[str, Signature], str]:
    """Name each kind by what the config told and by its experts; number what is still alike."""
    distinct = list(dict.fromkeys(keys))
    sizes = {_experts(parts, signature) for _, signature in distinct} - {0}
    plain = {key: _name(parts, key, exact=len(sizes) > 1) for key in distinct}
    taken = Counter(plain[key] for key in distinct)
    seen: Counter[str] = Counter()
    for key in distinct:
        name = plain[key]
        seen[name] += 1
        if taken[name] > 1:
            plain[key] = f"{name}, form {seen[name]}"
    return plain


def _name(parts: Anatomy, key: tuple[str, Signature], *, exact: bool) -> str:
    told, signature = key
    if not parts.experts:
        return told or "dense"
    count = _experts(parts, signature)
    sparse = f"{count} experts" if exact else "experts"
    return " + ".join(filter(None, (told, sparse if count else "dense")))


def _experts(parts: Anatomy, signature: Signature) -> int:
    """Count a layer's experts: by their numbers, or all where they are stored as one."""
    inside = [rest.split(".experts.")[1] for rest, _, _ in signature if ".experts." in rest]
    numbers = {rest.split(".")[0] for rest in inside} if inside else set()
    return len(numbers) if all(n.isdigit() for n in numbers) else parts.experts


def _group(checkpoint: Checkpoint, parts: Anatomy, kind: str, members: list[int]) -> LayerGroup:
    first = members[0]
    names = [parts.stack.name(first, rest) for rest in parts.stack.layers[first]]
    tensors = [checkpoint.tensors[name] for name in names]
    return LayerGroup(
        kind=kind,
        layers=ranges(members),
        count=len(members),
        tensors=len(tensors),
        parameters=sum(t.numel for t in tensors),
        bytes=sum(t.nbytes for t in tensors),
    )


def ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers as `0-2, 5, 7-9`."""
    runs = [
        [number for _, number in run]
        for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def pattern(kinds: Sequence[str]) -> str:
    """Write a sequence of kinds: by its period if it has one, else by the layers' numbers."""
    period = _period(kinds)
    whole, rest = divmod(len(kinds), period)
    if period == 1 or whole == 1:
        return ", ".join(f"{ranges(numbers)} {kind}" for kind, numbers in _runs(kinds))
    unit = _counted(kinds[:period])
    return f"{whole} x ({unit})" + (f", {_counted(kinds[whole * period :])}" if rest else "")


def _period(kinds: Sequence[str]) -> int:
    """Return the shortest period that the whole sequence keeps; its length if there is none."""
    lengths = range(1, len(kinds) // 2 + 1)
    return next((p for p in lengths if kinds[p:] == kinds[:-p]), len(kinds))


def _runs(kinds: Sequence[str]) -> list[tuple[str, list[int]]]:
    grouped = groupby(enumerate(kinds), key=lambda pair: pair[1])
    return [(kind, [number for number, _ in run]) for kind, run in grouped]


def _counted(kinds: Sequence[str]) -> str:
    return ", ".join(f"{len(numbers)} {kind}" for kind, numbers in _runs(kinds))
