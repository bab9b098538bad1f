"""Halve a model: pairs of units and pairs of layers become their means."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from growth.depth import SCALABLE
from growth.dimensions import Dimensions, find_dimensions
from growth.levels.ends import Ends, ends_of, halve_config
from growth.levels.layout import Sources, check_alike, names_of
from growth.levels.pairs import Pairing, Width, check_even, halved, pairs_of, width_of
from growth.resized import resized
from surgery.anatomy import Anatomy, anatomy
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.errors import PlanError, RecipeError
from surgery.layers.config import remap_config
from surgery.layers.kinds import check_kinds
from surgery.plan import Plan, Step, TensorSpec, check_plan

OTHER_PAIRS = "choose other pairs with --layer-pairs, or keep the depth: --no-depth"


def coalesce(
    base: Checkpoint,
    *,
    width: bool = True,
    depth: bool = True,
    pairs: Pairing = "stacked",
    layer_pairs: Pairing = "adjacent",
) -> Plan:
    """Halve the width, the depth or both.

    In width W' = F W T^T: F averages each pair of outputs, T^T adds each pair of inputs. Heads
    stay whole and keep their width; key-value heads are paired with their groups. In depth each
    two layers become their mean (R).

    Args:
        pairs: units i and i + n/2, or 2i and 2i + 1.
        layer_pairs: layers 2i and 2i + 1, or i and i + L/2.

    Raises:
        RecipeError: nothing to do, or units or layers that do not come in pairs.
        PlanError: the architecture is not known, or paired layers are of two kinds.

    Source: arXiv 2404.07999, sections 3.1 and 3.2, and the authors' code for the matrices.
    Deviation: a tied embedding is averaged, and the gain of the last norm doubled, where the
    authors double the embedding, which changes what a model without a norm behind it computes.
    """
    if not (width or depth):
        raise RecipeError("coalesce", "has nothing to do with --no-width and --no-depth")
    parts = anatomy(base)
    layers = _layers(base, parts, depth, layer_pairs)
    if base.config is None:
        fact = "holds no config.json, so the sizes of the result could not be told"
        raise PlanError(base.root, fact, "name the model's directory")
    halver = _Halver(base, pairs) if width else None
    config = remap_config(dict(base.config), parts, [group[0] for group in layers])
    if halver is not None:
        halve_config(config, parts, keys=halver.width.keys_paired)
    named = list(names_of(base, parts, layers))
    parameters = {"width": width, "depth": depth, "pairs": pairs, "layer_pairs": layer_pairs}
    return check_plan(
        Plan(
            operation="coalesce",
            parameters=parameters,
            sources=(base,),
            steps=tuple(_steps(base, named, halver)),
            order=tuple(name for name, _ in named),
            config=config,
            carried=base.carried,
            facts={"levels": {"layers": [list(group) for group in layers], **parameters}},
            notes=(*base.notes, *_notes(parts, depth)),
        )
    )


def _notes(parts: Anatomy, depth: bool) -> Iterator[str]:
    if depth and parts.experts:
        yield "experts of paired layers are averaged by their number, which may mean another one"


def _layers(base: Checkpoint, parts: Anatomy, depth: bool, how: Pairing) -> Sequence[Sources]:
    if parts.extra_layers:
        fact = f"has {parts.extra_layers} predictor layer(s) after its own, which have no pair"
        raise PlanError(base.ref, fact, "remove them first")
    if not depth:
        return [(n,) for n in range(parts.layers)]
    if parts.layers % 2:
        fact = f"has {parts.layers} layer(s), which do not come in pairs"
        raise RecipeError(base.ref, fact, "coalesce its width alone: --no-depth")
    found = pairs_of(parts.layers, how)
    check_kinds(base, parts)
    check_alike(base, parts, found, OTHER_PAIRS)
    return found


class _Halver:
    """Gives each tensor at half the width."""

    def __init__(self, base: Checkpoint, how: Pairing) -> None:
        self.found: Dimensions = find_dimensions(base)
        self.ends: Ends = ends_of(base, self.found)
        self.width: Width = width_of(self.found.heads, how)
        check_even(axis for axes in self.found.axes.values() for axis in axes)

    def __call__(self, tensor: TensorInfo) -> TensorInfo:
        mixes = [halved(axis, self.width) for axis in self.found.axes[tensor.name]]
        return resized(tensor, mixes, why="average pairs")

    def factor(self, name: str) -> tuple[float, float]:
        return self.ends.factor(name, self.found.parts)


def _steps(
    base: Checkpoint, named: Sequence[tuple[str, tuple[str, ...]]], halver: _Halver | None
) -> Iterator[Step]:
    for name, sources in named:
        tensors = [base.tensors[source] for source in sources]
        if halver is not None:
            tensors = [halver(tensor) for tensor in tensors]
        factor = halver.factor(sources[0]) if halver else (1.0, 0.0)
        yield mean_step(name, tensors, factor=factor, why="average pairs")


def mean_step(
    name: str,
    tensors: Sequence[TensorInfo],
    *,
    factor: tuple[float, float] = (1.0, 0.0),
    dtype: str | None = None,
    why: str,
) -> Step:
    """Return the step that writes a * mean + b of equal shapes; a copy where that is one tensor.

    Raises:
        PlanError: numbers that cannot be computed with.
    """
    spec = TensorSpec(dtype or tensors[0].dtype, tensors[0].shape)
    if len(tensors) == 1 and factor == (1.0, 0.0) and spec.dtype == tensors[0].dtype:
        return Step(inputs=tuple(tensors), outputs=((name, spec),))
    odd = next((t for t in tensors if t.dtype not in SCALABLE), None)
    if odd is not None:
        fact = f"is stored as {odd.dtype}, which is not computed with"
        raise PlanError(odd.name, fact, "dequantise the checkpoint first")
    fn: Callable[..., Any] = partial(_mean, factor=factor[0], shift=factor[1])
    return Step(
        inputs=tuple(tensors),
        outputs=((name, spec),),
        fn=fn,
        elementwise=True,
        plain=not any(hasattr(tensor, "make") for tensor in tensors),
        why=why,
        key=repr(factor),
    )


def _mean(*tensors: Any, factor: float, shift: float) -> Any:  # noqa: ANN401 - torch or numpy
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total * (factor / len(tensors)) + shift
