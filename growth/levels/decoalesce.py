"""Double a model back to the sizes of another: the transposes of coalescing."""

from collections.abc import Iterator

from growth.depth import SCALABLE
from growth.dimensions import Dimensions, find_dimensions
from growth.levels.coalesce import mean_step
from growth.levels.ends import Ends, ends_of
from growth.levels.layout import Sources, names_of
from growth.levels.pairs import Pairing, Width, doubled, pairs_of, width_of
from growth.resized import resized
from surgery.anatomy import Anatomy, anatomy
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.errors import PlanError, RecipeError
from surgery.plan import Plan, Step, check_plan


def decoalesce(
    small: Checkpoint,
    like: Checkpoint,
    *,
    pairs: Pairing = "stacked",
    layer_pairs: Pairing = "adjacent",
) -> Plan:
    """Give a coalesced model the sizes that it had.

    In width W' = T W F^T: each output is written twice, and what each input had is shared by
    two, so that the model computes the same function. In depth (G) each layer is written twice.

    Args:
        small: a model that `coalesce` made, trained since or not.
        like: the model it was made of; its config, sizes and dtypes are taken, and no weights.
        pairs, layer_pairs: as they were when it was coalesced.

    Raises:
        RecipeError: `like` is neither of the same nor of twice the sizes.
        PlanError: the architecture is not known.

    Source: arXiv 2404.07999, sections 3.1 and 3.2; see `coalesce` for the deviation.
    """
    parts, large = anatomy(small), anatomy(like)
    if like.config is None or small.config is None:
        fact = "holds no config.json, and the result needs one"
        raise PlanError((small if small.config is None else like).root, fact)
    _check_family(small, like, parts, large)
    layers = _layers(like, parts, large, layer_pairs)
    doubler = _Doubler(small, like, pairs) if _is_wider(small, like, parts) else None
    if doubler is None and large.layers == parts.layers:
        fact = f"has the sizes of {small.ref} already, so nothing would change"
        raise RecipeError(f"--like {like.ref}", fact, "name the model that was coalesced")
    named = list(names_of(like, large, _own(large)))
    return check_plan(
        Plan(
            operation="decoalesce",
            parameters={"pairs": pairs, "layer_pairs": layer_pairs},
            sources=(small, like),
            steps=tuple(_steps(small, like, [name for name, _ in named], layers, doubler)),
            order=tuple(name for name, _ in named),
            config=dict(like.config),
            carried=small.carried,
            dropped=dict.fromkeys(like.tensors, "only its shape is taken"),
            facts={"layer_map": list(layers)},
            notes=small.notes,
        )
    )


def _own(parts: Anatomy) -> list[Sources]:
    return [(n,) for n in range(parts.layers)]


def _check_family(small: Checkpoint, like: Checkpoint, parts: Anatomy, large: Anatomy) -> None:
    if parts.family != large.family:
        fact = f"is a {large.family}, and {small.ref} a {parts.family}"
        raise RecipeError(f"--like {like.ref}", fact, "name the model that was coalesced")
    if parts.extra_layers or large.extra_layers:
        fact = "has predictor layers after its own, which have no pair"
        raise PlanError(like.ref, fact, "remove them first")


def _layers(like: Checkpoint, parts: Anatomy, large: Anatomy, how: Pairing) -> tuple[int, ...]:
    """Return for each new layer the one that it is a copy of."""
    if large.layers == parts.layers:
        return tuple(range(parts.layers))
    if large.layers != 2 * parts.layers:
        fact = f"has {large.layers} layers, neither as many as the {parts.layers} nor twice that"
        raise RecipeError(f"--like {like.ref}", fact, "name the model that was coalesced")
    found = {n: i for i, pair in enumerate(pairs_of(large.layers, how)) for n in pair}
    return tuple(found[n] for n in range(large.layers))


def _is_wider(small: Checkpoint, like: Checkpoint, parts: Anatomy) -> bool:
    name = parts.embedding or ""
    return name not in like.tensors or small.tensors[name].shape != like.tensors[name].shape


class _Doubler:
    """Gives each tensor at twice the width."""

    def __init__(self, small: Checkpoint, like: Checkpoint, how: Pairing) -> None:
        self.found: Dimensions = find_dimensions(small)
        self.ends: Ends = ends_of(small, self.found)
        self.width: Width = width_of(find_dimensions(like).heads, how)

    def __call__(self, tensor: TensorInfo) -> TensorInfo:
        mixes = [doubled(axis, self.width) for axis in self.found.axes[tensor.name]]
        return resized(tensor, mixes, why="double")

    def factor(self, name: str) -> tuple[float, float]:
        scale, shift = self.ends.factor(name, self.found.parts)
        return 1 / scale, -shift / scale


def _steps(
    small: Checkpoint,
    like: Checkpoint,
    names: list[str],
    layers: tuple[int, ...],
    doubler: _Doubler | None,
) -> Iterator[Step]:
    parts, used = anatomy(small), set()
    for name in names:
        inside = parts.locate(name)
        source = parts.stack.name(layers[inside[0]], inside[1]) if inside else name
        if source not in small.tensors:
            fact = f"has {name!r}, for which {small.ref} has no {source!r}"
            raise RecipeError(f"--like {like.ref}", fact, "name the model that was coalesced")
        used.add(source)
        tensor = small.tensors[source]
        factor = doubler.factor(source) if doubler else (1.0, 0.0)
        made = doubler(tensor) if doubler else tensor
        _check_size(like, name, made)
        dtype = like.tensors[name].dtype
        kept = dtype not in SCALABLE or tensor.dtype not in SCALABLE
        told = tensor.dtype if kept else dtype
        yield mean_step(name, [made], factor=factor, dtype=told, why="double")
    lost = next((name for name in small.tensors if name not in used), None)
    if lost is not None:
        fact = f"has nothing that {lost!r} of {small.ref} becomes"
        raise RecipeError(f"--like {like.ref}", fact, "name the model that was coalesced")


def _check_size(like: Checkpoint, name: str, made: TensorInfo) -> None:
    wanted = like.tensors[name].shape
    if made.shape != wanted:
        fact = f"has {name} of shape {list(wanted)}, and the smaller model makes {list(made.shape)}"
        remedy = "name the model that was coalesced, and give the same --pairs"
        raise RecipeError(f"--like {like.ref}", fact, remedy)
