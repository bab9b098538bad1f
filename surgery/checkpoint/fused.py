"""Adapters of fused experts, which are parameters of one module (peft's target_parameters)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from surgery.checkpoint.adapted import Adapted
from surgery.checkpoint.adapters import MATRIX, Adapter, Factors
from surgery.checkpoint.header import TensorInfo, quoted
from surgery.checkpoint.lowrank import Change
from surgery.errors import CheckpointError

# A parameter in memory, and the modules that hold it expert by expert on disk.
PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
# Families whose fused experts are stored [experts, in, out], for those that are square.
SWAPPED = ("gpt_oss", "openai_privacy_filter", "aria", "aria_text")
STACKED = 3  # axes: experts, rows, columns


@dataclass(frozen=True, slots=True)
class Piece:
    """A stored tensor of a parameter: which expert it is of, and which rows; None for all."""

    tensor: TensorInfo
    expert: int | None = None
    first: int = 0
    rows: int | None = None


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter [rows, columns] of some experts, stored as one or in pieces."""

    experts: int
    rows: int
    columns: int
    pieces: tuple[Piece, ...]


def adapt_parameters(
    to: Adapted, adapter: Adapter, module: str, factors: Sequence[Factors]
) -> None:
    """Adapt parameters of one module.

    Several of them are told apart by their shapes: an adapter does not name them.

    Raises:
        CheckpointError: the base lacks them, or the shapes do not tell which is which.
    """
    named = (str(name) for name in adapter.config.get("target_parameters") or ())
    leaves = [n.rpartition(".")[2] for n in named if _is_inside(n, module)]
    places = [found for leaf in leaves if (found := _parameter(to, module, leaf))]
    if not places:
        to.checked(adapter, f"{module}.weight")
    for item in factors:
        fits = [place for place in places if _fits(item, place)]
        if len(fits) != 1:
            fact = f"adapts parameters of {quoted(module)} that its shapes do not tell"
            raise CheckpointError(adapter.file, fact, "merge it by peft")
        for piece in fits[0].pieces:
            to.checked(adapter, piece.tensor.name)
            to.change(to.tensors[piece.tensor.name], _change(to, item, fits[0], piece))


def _is_inside(parameter: str, module: str) -> bool:
    head = parameter.rpartition(".")[0]
    return not head or f".{module}".endswith(f".{head}")


def _parameter(to: Adapted, module: str, leaf: str) -> Parameter | None:
    name = to.find(f"{module}.{leaf}")
    if name is not None:
        tensor = to.tensors[name]
        if len(tensor.shape) not in {MATRIX, STACKED}:
            return None
        *experts, rows, columns = tensor.shape
        return Parameter(experts[0] if experts else 1, rows, columns, (Piece(tensor),))
    for names in PARTS.get(leaf, ()):
        pieces = tuple(_pieces(to, module, names))
        if pieces:
            rows = sum(piece.tensor.shape[0] for piece in pieces if piece.expert == 0)
            columns = pieces[0].tensor.shape[1]
            return Parameter(len(pieces) // len(names), rows, columns, pieces)
    return None


def _pieces(to: Adapted, module: str, names: Sequence[str]) -> Iterator[Piece]:
    expert = 0
    while all(to.find(f"{module}.{expert}.{name}.weight") for name in names):
        first = 0
        for name in names:
            tensor = to.tensors[to.find(f"{module}.{expert}.{name}.weight") or ""]
            yield Piece(tensor, expert, first, tensor.shape[0])
            first += tensor.shape[0]
        expert += 1


def _fits(factors: Factors, place: Parameter) -> bool:
    plain = (factors.b.shape[0], factors.a.shape[1])
    shapes = [(place.rows, place.columns)]
    if place.pieces[0].expert is None and place.experts > 1:
        shapes.append((place.columns, place.rows))
    return plain in shapes and factors.a.shape[0] == place.experts * factors.rank


def _change(to: Adapted, factors: Factors, place: Parameter, piece: Piece) -> Change:
    swapped = (factors.b.shape[0], factors.a.shape[1]) != (place.rows, place.columns)
    if place.rows == place.columns and piece.expert is None and place.experts > 1:
        swapped = (to.config or {}).get("model_type") in SWAPPED
    return Change(
        factors=factors,
        swapped=swapped,
        experts=place.experts,
        expert=piece.expert,
        first=piece.first,
        rows=piece.rows,
    )
