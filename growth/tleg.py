"""Any depth from a line over depth: W_l = A + l B, fitted to a trained model's layers."""

from collections.abc import Callable, Generator, Iterator, Sequence
from math import fsum
from typing import Any, Literal

from growth.depth import MOST_LAYERS, SCALABLE
from growth.levels.layout import check_uniform, names_of
from surgery.anatomy import Anatomy, anatomy
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.errors import PlanError, RecipeError
from surgery.layers.config import remap_config
from surgery.layers.kinds import check_kinds, refuse_recursive
from surgery.plan import Part, Pass, Plan, Step, Tell, TensorSpec, check_plan

Positions = Literal["relative", "ends", "index"]
TOLD = "explained"


def tleg(base: Checkpoint, *, layers: int, positions: Positions = "relative") -> Plan:
    """Fit A + l B to every tensor of the layers by least squares, and make `layers` new ones.

    Norms and biases are fitted as the matrices are; what lies outside the layers stays. The
    share of each tensor's variance over the layers that the line explains is told.

    Args:
        layers: N, of the result; the base has L.
        positions: where on the fitted line new layer i lies. `relative` at i L / N, equal shares
            of the depth, as the authors unroll it; `ends` at i (L - 1) / (N - 1), so that first
            and last fall on the base's; `index` at i, which extrapolates beyond L.

    Raises:
        RecipeError: a number of layers that makes no sense.
        PlanError: layers are not built alike, or are stored in a form that is not computed with.

    Source: "Transformer as Linear Expansion of Learngene", arXiv 2312.05614, and the authors'
    code for the positions l / L. Deviation: they train A and B; here both come from a model that
    was trained without them, by the closed form of least squares.
    """
    refuse_recursive(base)
    parts = anatomy(base)
    _check(base, parts, layers)
    places = _places(parts.layers, layers, positions)
    sources = [min(max(round(place), 0), parts.layers - 1) for place in places]
    config = base.config and remap_config(dict(base.config), parts, sources)
    check_kinds(base, parts)
    order = [name for name, _ in names_of(base, parts, [(0,)] * layers)]
    return check_plan(
        Plan(
            operation="tleg",
            parameters={"layers": layers, "positions": positions},
            sources=(base,),
            steps=tuple(_steps(base, parts, places)),
            order=tuple(order),
            config=config,
            carried=base.carried,
            facts={"layer_positions": places, "trainable_layers": list(range(layers))},
            notes=tuple(_notes(base, config, parts)),
        )
    )


def _check(base: Checkpoint, parts: Anatomy, layers: int) -> None:
    if not 1 <= layers <= MOST_LAYERS:
        fact = f"is outside 1 to {MOST_LAYERS}"
        raise RecipeError(f"--layers {layers}", fact, "say how many layers the result has")
    if parts.layers < 2:  # noqa: PLR2004 - a line has two points
        raise RecipeError(base.ref, "has one layer, and a line needs two", "use `surgery stack`")
    check_uniform(base, parts)


def _places(count: int, layers: int, positions: Positions) -> list[float]:
    if positions == "index":
        return [float(i) for i in range(layers)]
    if positions == "relative":
        return [i * count / layers for i in range(layers)]
    if layers == 1:
        return [(count - 1) / 2]
    return [i * (count - 1) / (layers - 1) for i in range(layers)]


def _notes(base: Checkpoint, config: object, parts: Anatomy) -> Iterator[str]:
    yield from base.notes
    if config is None:
        yield "a bare file has no config: load it with as many layers as were made"
    if parts.experts:
        yield "experts are fitted by their number, which may mean another one in each layer"


def _steps(base: Checkpoint, parts: Anatomy, places: Sequence[float]) -> Iterator[Step]:
    for name, tensor in base.tensors.items():
        if parts.locate(name) is None:
            yield Step(inputs=(tensor,), outputs=((name, TensorSpec(tensor.dtype, tensor.shape)),))
    for rest in parts.stack.layers[0]:
        own = [base.tensors[parts.stack.name(n, rest)] for n in range(parts.layers)]
        odd = next((tensor for tensor in own if tensor.dtype not in SCALABLE), None)
        if odd is not None:
            fact = f"is stored as {odd.dtype}, which is not computed with"
            raise PlanError(odd.name, fact, "dequantise the checkpoint first")
        names = [parts.stack.name(n, rest) for n in range(len(places))]
        yield _step(names, own, places)


def _step(names: Sequence[str], own: Sequence[TensorInfo], places: Sequence[float]) -> Step:
    """Return the step that makes one tensor of all new layers from that of all old ones."""
    weights = combinations(len(own), places)

    def fit() -> Generator[Pass | Tell, Any, Callable[..., Any]]:
        found: list[tuple[float, float]] = yield Pass(fn=spread)
        total, line = (fsum(column) for column in zip(*found, strict=True))
        yield Tell(explained=line / total if total else 1.0)
        return lambda _, *inputs: tuple(_combine(inputs, row) for row in weights)

    spec = TensorSpec(own[0].dtype, own[0].shape)
    return Step(
        inputs=tuple(own),
        outputs=tuple((name, spec) for name in names),
        fn=fit,
        passes=True,
        why="fit a line",
        key=repr(places),
        tells=(TOLD,),
    )


def combinations(count: int, places: Sequence[float]) -> list[list[float]]:
    """Return, per place on the fitted line, the factors of the layers whose sum it is."""
    middle = (count - 1) / 2
    spread = fsum((n - middle) ** 2 for n in range(count))
    slopes = [(n - middle) / spread for n in range(count)]
    return [[1 / count + (place - middle) * slope for slope in slopes] for place in places]


def spread(_: Part, *inputs: Any) -> tuple[float, float]:  # noqa: ANN401 - tensors
    """Return the sum of squares about the mean, and how much of it the line takes."""
    count = len(inputs)
    middle = (count - 1) / 2
    wide = [tensor.double() for tensor in inputs]
    mean = sum(wide) / count
    off = [tensor - mean for tensor in wide]
    slope = sum((n - middle) * tensor for n, tensor in enumerate(off))
    over = fsum((n - middle) ** 2 for n in range(count))
    total = fsum(float(tensor.square().sum()) for tensor in off)
    return total, float(slope.square().sum()) / over


def _combine(inputs: Sequence[Any], row: Sequence[float]) -> Any:  # noqa: ANN401 - a tensor
    return sum(factor * tensor for factor, tensor in zip(row, inputs, strict=True))
