"""Inserted layers whose matrices a small network predicts from their neighbours (LESA)."""

from collections.abc import Iterator
from typing import Any, Literal

from growth.depth import SCALABLE, parse_layers
from growth.lesa.predict import Ask, predict, scratch
from growth.levels.coalesce import mean_step
from growth.levels.layout import check_uniform, names_of
from surgery.alignment.groups import INPUTS_FIRST
from surgery.anatomy import Anatomy, anatomy
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.errors import PlanError, RecipeError
from surgery.layers.config import remap_config
from surgery.layers.kinds import check_kinds, refuse_recursive
from surgery.plan import Plan, Step, TensorSpec, check_plan

Norms = Literal["first", "neighbours"]
MATRIX = 2
FEWEST = 3  # layers that a window of training has

__all__ = ["Norms", "lesa"]


def lesa(
    base: Checkpoint,
    *,
    insert: str | None = None,
    blocks: int | None = None,
    norms: Norms = "first",
    seed: int = 0,
) -> Plan:
    """Insert layers between neighbours, each matrix predicted in the basis that all layers share.

    The matrices of one kind, side by side, are U S [V_0 ... V_L-1]. A network of three linear
    maps learns V_l from V_l-1 and V_l+1 for every layer that has both, and is asked for what lies
    between two neighbours: W = U S V.

    Args:
        insert: layers that a new one is to follow, such as `3,5`; ranges include both ends.
        blocks: instead, how many new layers, in the last gaps between layers, as the authors.
        norms: norms and biases of a new layer: layer 0's as in the authors' notebook, whose
            gains are small, so that a poor prediction does less harm; or its neighbours' mean.
        seed: of the network's first weights and of the order of its training.

    Raises:
        RecipeError: gaps that are not there, or fewer than three layers.
        PlanError: layers that are not built alike, or a mixture of experts.

    Source: LESA, arXiv 2502.13794, section 3, and the authors' notebook: 256 hidden units, ReLU,
    10 epochs of batches of 64, AdamW at 1e-3, loss 0.9995 MSE + 0.0005 of the norms' squared
    difference. Deviations: the basis comes from the eigenvectors of the Gram matrix in float64,
    directions below a millionth of the largest singular value left out.
    """
    refuse_recursive(base)
    parts = anatomy(base)
    _check(base, parts)
    after = _gaps(parts.layers, insert, blocks)
    sources = [n for layer in range(parts.layers) for n in [layer] * (1 + (layer in after))]
    new = {i: sources[i] for i in range(1, len(sources)) if sources[i] == sources[i - 1]}
    config = base.config and remap_config(dict(base.config), parts, sources)
    check_kinds(base, parts)
    return check_plan(
        Plan(
            operation="lesa",
            parameters={"insert": insert, "blocks": blocks, "norms": norms, "seed": seed},
            sources=(base,),
            steps=(
                *_copies(base, parts, {i: n for i, n in enumerate(sources) if i not in new}),
                *_inserted(base, parts, new, norms=norms, seed=seed),
            ),
            order=tuple(name for name, _ in names_of(base, parts, [(n,) for n in sources])),
            config=config,
            carried=base.carried,
            facts={"layer_map": sources, "trainable_layers": list(new)},
            notes=tuple(_notes(base, config)),
        )
    )


def _check(base: Checkpoint, parts: Anatomy) -> None:
    if parts.layers < FEWEST:
        fact = f"has {parts.layers} layer(s), and one between two others is what is learnt"
        raise RecipeError(base.ref, fact, "use `surgery stack`")
    check_uniform(base, parts)
    deep = (rest for rest in parts.stack.layers[0] if len(_tensor(base, parts, 0, rest).shape) > 2)  # noqa: PLR2004
    strange = next(deep, None)
    if parts.experts or strange:
        fact = "has experts, whose numbers mean another one in each layer"
        fact = fact if parts.experts else f"has {strange!r}, which is no matrix"
        raise PlanError(base.ref, fact, "use `surgery stack`")


def _gaps(count: int, insert: str | None, blocks: int | None) -> tuple[int, ...]:
    if (insert is None) == (blocks is None):
        fact = "needs one of --insert and --blocks"
        raise RecipeError("lesa", fact, "for instance --blocks 4")
    if blocks is not None:
        if not 1 <= blocks < count:
            fact = f"is outside 1 to {count - 1}, the gaps between {count} layers"
            raise RecipeError(f"--blocks {blocks}", fact)
        return tuple(range(count - 1 - blocks, count - 1))
    after = parse_layers(insert or "", option="--insert")
    beyond = next((n for n in after if n > count - 2), None)
    if beyond is not None:
        fact = f"names layer {beyond}, which no layer of {count} follows"
        raise RecipeError(f"--insert {insert}", fact, f"0 to {count - 2} are followed by one")
    if len(set(after)) < len(after):
        fact = "names a layer twice, but a gap takes one new layer"
        raise RecipeError(f"--insert {insert}", fact, "insert again into the result")
    return after


def _notes(base: Checkpoint, config: object) -> Iterator[str]:
    yield from base.notes
    if config is None:
        yield "a bare file has no config: load it with as many layers as were made"


def _tensor(base: Checkpoint, parts: Anatomy, layer: int, rest: str) -> TensorInfo:
    return base.tensors[parts.stack.name(layer, rest)]


def _copies(base: Checkpoint, parts: Anatomy, layers: dict[int, int]) -> Iterator[Step]:
    for name, tensor in base.tensors.items():
        if parts.locate(name) is None:
            yield _copy(name, tensor)
    for layer, source in layers.items():
        for rest in parts.stack.layers[source]:
            yield _copy(parts.stack.name(layer, rest), _tensor(base, parts, source, rest))


def _inserted(
    base: Checkpoint, parts: Anatomy, new: dict[int, int], *, norms: Norms, seed: int
) -> Iterator[Step]:
    """Yield the steps of new layers: matrices are predicted, a network for each kind."""
    for rest in parts.stack.layers[0]:
        if len(_tensor(base, parts, 0, rest).shape) == MATRIX:
            yield _predicted(base, parts, rest, new, seed)
            continue
        for layer, source in new.items():
            near = (0,) if norms == "first" else (source, source + 1)
            own = [_tensor(base, parts, n, rest) for n in near]
            yield mean_step(parts.stack.name(layer, rest), own, why=f"norms of {norms}")


def _copy(name: str, tensor: TensorInfo) -> Step:
    return Step(inputs=(tensor,), outputs=((name, TensorSpec(tensor.dtype, tensor.shape)),))


def _predicted(base: Checkpoint, parts: Anatomy, rest: str, new: dict[int, int], seed: int) -> Step:
    own = [_tensor(base, parts, n, rest) for n in range(parts.layers)]
    odd = next((tensor for tensor in own if tensor.dtype not in SCALABLE), None)
    if odd is not None:
        fact = f"is stored as {odd.dtype}, which is not computed with"
        raise PlanError(odd.name, fact, "dequantise the checkpoint first")
    swapped = parts.family in INPUTS_FIRST
    ask = Ask(after=tuple(new.values()), seed=f"{seed}\0{rest}", swapped=swapped)
    shape = own[0].shape[::-1] if swapped else own[0].shape

    def fn(*stored: Any) -> Iterator[Any]:  # noqa: ANN401 - `Stored` tensors
        return predict(stored, ask)

    spec = TensorSpec(own[0].dtype, own[0].shape)
    return Step(
        inputs=tuple(own),
        outputs=tuple((parts.stack.name(layer, rest), spec) for layer in new),
        fn=fn,
        streamed=True,
        scratch=scratch(parts.layers, *shape),
        why="predict",
        key=repr(ask),
        tells=("explained",),
    )
