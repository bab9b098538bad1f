"""Width by removal: the units that a measurement shows to do least, every layer to one size."""

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from growth.cutting import Widths, check_sizes, heads_left, parse_widths, sizes_beside
from growth.dimensions import Axis, Dimension, Dimensions, find_dimensions
from growth.resized import along, resized, selection
from growth.widen.config import KEYS
from growth.widen.families import EXACT, GEMMAS
from surgery.anatomy import dig
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.errors import PlanError, RecipeError
from surgery.plan import Plan, Step, TensorSpec, check_plan

if TYPE_CHECKING:
    import numpy as np

    from growth.resized import Mix
    from surgery.calibrate.statistics import Statistics

    Floats = np.ndarray[Any, np.dtype[np.float64]]


def narrow(base: Checkpoint, statistics: Checkpoint | None, *, width: str) -> Plan:
    """Plan a narrower model of the same architecture, its units chosen by their activations.

    Scores are those of Minitron (arXiv 2407.14679, section 2.2), summed up as its table 11 found
    best, by the mean over tokens and the L2 norm over rows: of a feed-forward unit what it hands
    to the output map, of a head what it hands to the output map, of a channel of the residual
    stream what norms make of it, over all layers. A group of keys and values counts as its heads
    do. Units that stay keep their order and their bits.

    Args:
        base: a decoder or BERT-like encoder whose widths are known.
        statistics: of `surgery calibrate --collect inputs`; None takes the first units, which
            only a look ahead should.
        width: see `parse_widths`.

    Raises:
        RecipeError: sizes that are no smaller, or that break heads or groups.
        CheckpointError: the statistics lack what is needed.
        PlanError: an architecture whose widths cannot be changed.
    """
    found = find_dimensions(base)
    asked = parse_widths(width)
    sizes = _check(base, found, asked, width)
    scores = _Scores(found, _opened(statistics, base))
    kept = _Kept(found, sizes, scores)
    tensors = {name: kept.of(tensor) for name, tensor in base.tensors.items()}
    steps = tuple(_step(name, tensor, base.tensors[name]) for name, tensor in tensors.items())
    beside = () if statistics is None else (statistics,)
    return check_plan(
        Plan(
            operation="prune width",
            parameters={"width": width},
            sources=(base, *beside),
            steps=steps,
            order=tuple(tensors),
            config=_config(base, found, sizes),
            carried=base.carried,
            dropped={name: "read when planned" for source in beside for name in source.tensors},
            facts={
                "width": {
                    "hidden": sizes.hidden,
                    "ffn": sizes.ffn,
                    "heads": sizes.heads,
                    "kv_heads": sizes.keys,
                },
                "trainable_layers": list(range(found.parts.layers)),
            },
            notes=(*base.notes, _told(base, found, sizes, tensors)),
        )
    )


def _told(
    base: Checkpoint, found: Dimensions, new: Widths, tensors: Mapping[str, TensorInfo]
) -> str:
    """Sum up old and new sizes."""
    old = _own(found)
    pairs = sizes_beside(old, new)
    sizes = [f"{name} {was} -> {now}" for name, (was, now) in pairs.items() if was != now]
    before = sum(tensor.numel for tensor in base.tensors.values())
    after = sum(tensor.numel for tensor in tensors.values())
    return f"{', '.join(sizes)}; {after / before:.1%} of the parameters stay"


def _own(found: Dimensions) -> Widths:
    heads = found.heads
    return Widths(hidden=found.hidden, ffn=_units(found), heads=heads.queries, keys=heads.keys)


def _opened(statistics: Checkpoint | None, base: Checkpoint) -> "Statistics | None":
    if statistics is None:
        return None
    from surgery.calibrate.statistics import open_statistics  # with numpy

    return open_statistics(statistics, base)


def _step(name: str, tensor: TensorInfo, old: TensorInfo) -> Step:
    spec = TensorSpec(tensor.dtype, tensor.shape)
    return Step(inputs=(tensor,), outputs=((name, spec),), why="copy" if tensor is old else "cut")


def _check(base: Checkpoint, found: Dimensions, asked: Mapping[str, int], width: str) -> Widths:
    family, heads = found.heads.family, found.heads
    place = base.root / "config.json"
    if family not in EXACT or found.parts.experts:
        fact = f"{family} is an architecture whose widths are not known well enough to cut"
        raise PlanError(place, fact, "drop layers instead: surgery prune --method")
    if "hidden" in asked and family in GEMMAS:
        fact = f"{family} multiplies its embedding by the square root of the width"
        raise PlanError(place, fact, "cut ffn or heads instead")
    if found.parts.lost_head or found.parts.extra_layers:
        fact = "promises a head that is not there, or has layers after its own"
        raise PlanError(place, fact)
    old = _own(found)
    new = Widths(
        hidden=asked.get("hidden", old.hidden),
        ffn=asked.get("ffn", old.ffn),
        heads=asked.get("heads", heads_left(asked, old)),
        keys=asked.get("kv-heads", old.keys if heads.keys != heads.queries else -1),
    )
    if new.keys < 0:  # one key-value head a query head
        new = Widths(hidden=new.hidden, ffn=new.ffn, heads=new.heads, keys=new.heads)
    check_sizes(old, new, width)
    text = dig(base.config or {}, found.parts.section)
    free = "head_dim" in text or "num_key_value_heads" in text
    if not free and new.hidden != new.heads * heads.width:
        fact = f"ties {new.heads} heads of {heads.width} to a width of {new.heads * heads.width}"
        raise RecipeError(f"--width {width}", f"{family} {fact}", "cut hidden and heads in step")
    return new


def _units(found: Dimensions) -> int:
    sizes = {
        segment.units
        for axes in found.axes.values()
        for axis in axes
        for segment in axis.segments
        if segment.dimension == "ffn"
    }
    if len(sizes) != 1:
        fact = f"has feed-forward layers of {len(sizes)} sizes"
        raise PlanError("the model", fact, "only one size for all layers can be cut")
    return sizes.pop()


class _Scores:
    """How much each unit does, by statistics; without any the first units do most."""

    def __init__(self, found: Dimensions, statistics: "Statistics | None") -> None:
        self.found, self.statistics = found, statistics

    def layer(self, layer: int, dimension: Dimension) -> "Floats":
        """Return the score of every unit of a layer: of what its output map reads."""
        total: Floats = sum(
            self._read(module).reshape(axis.segments[0].units, -1).sum(1)
            for module, axis in self._readers(dimension)
            if (located := self.found.parts.locate(module)) and located[0] == layer
        )
        return total

    def stream(self) -> "Floats":
        """Return the score of every channel of the residual stream, over all layers."""
        import numpy as np

        seen: dict[tuple[int | None, bytes], Floats] = {}
        for module, _ in self._readers("hidden"):
            scores = self._read(module)
            located = self.found.parts.locate(module)
            seen[located[0] if located else None, scores.tobytes()] = np.sqrt(scores)
        total: Floats = np.sum(list(seen.values()), axis=0)
        return total

    def _readers(self, dimension: Dimension) -> list[tuple[str, Axis]]:
        """Return the linear maps of the layers that read a dimension."""
        return [
            (name.removesuffix(".weight"), axis)
            for name, axes in self.found.axes.items()
            if name.endswith(".weight") and self.found.parts.locate(name) and len(axes) > 1
            for axis in axes
            if axis.side == "in" and axis.is_of(dimension)
        ]

    def _read(self, module: str) -> "Floats":
        import numpy as np

        if self.statistics is None:
            axes = self.found.axes[f"{module}.weight"]
            size = next(axis.size for axis in axes if axis.side == "in")
            return np.arange(size, 0, -1, dtype=np.float64)
        from surgery.calibrate.statistics import read_numbers

        return read_numbers(self.statistics.tensor(f"{module}.absolute", "inputs"))


class _Kept:
    """Which units stay, and tensors cut to them."""

    def __init__(self, found: Dimensions, sizes: Widths, scores: _Scores) -> None:
        self.found = found
        self.stream: dict[str, Mix] = {}
        if sizes.hidden < found.hidden:
            self.stream["hidden"] = selection(_best(scores.stream(), sizes.hidden))
        self.layers = [self._layer(n, sizes, scores) for n in range(found.parts.layers)]

    def _layer(self, layer: int, sizes: Widths, scores: _Scores) -> "dict[str, Mix]":
        heads = self.found.heads
        kept: dict[str, Mix] = {}
        if sizes.ffn < _units(self.found):
            kept["ffn"] = selection(_best(scores.layer(layer, "ffn"), sizes.ffn))
        if (sizes.heads, sizes.keys) != (heads.queries, heads.keys):
            by_group = scores.layer(layer, "query").reshape(heads.keys, -1)
            groups = _best(by_group.sum(1), sizes.keys)
            each, size = sizes.heads // sizes.keys, heads.queries // heads.keys
            kept["key"] = selection(groups)
            kept["query"] = selection(
                [group * size + n for group in groups for n in _best(by_group[group], each)]
            )
        return kept

    def of(self, tensor: TensorInfo) -> TensorInfo:
        """Return a tensor with the units that stay."""
        located = self.found.parts.locate(tensor.name)
        units = {**self.stream, **(self.layers[located[0]] if located else {})}
        mixes = [along(axis, units) for axis in self.found.axes[tensor.name]]
        return resized(tensor, mixes, why="cut")


def _best(scores: "Floats", count: int) -> list[int]:
    """Return the units of the highest scores, in their own order; of equal ones the first."""
    order = sorted(range(len(scores)), key=lambda n: (-scores[n], n))
    return sorted(order[:count])


def _config(base: Checkpoint, found: Dimensions, sizes: Widths) -> dict[str, Any]:
    new = deepcopy(dict(base.config or {}))
    text: Any = dig(new, found.parts.section)
    values = {"hidden": sizes.hidden, "ffn": sizes.ffn, "query": sizes.heads, "key": sizes.keys}
    for dimension, keys in KEYS:
        for key in keys:
            if dimension in values and type(text.get(key)) is int:
                text[key] = values[dimension]
    if "n_inner" in text:
        text["n_inner"] = sizes.ffn
    if "head_dim" in text or "num_key_value_heads" in text:
        text["head_dim"] = found.heads.width
    return new
