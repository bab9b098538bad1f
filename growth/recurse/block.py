"""One linear layer of a block at all its depths: the tied weight, and what each depth adds."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from growth.recurse.factor import Factors, Svd, factorise, scratch
from surgery.checkpoint import BITS, TensorInfo
from surgery.compute import torch_dtype
from surgery.plan import Step, Tell, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 20  # elements of the rows that are read at once
Names = tuple[str, str]  # of the factors A and B


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """How residuals are decomposed.

    Attributes:
        seed: of sketches, and of the factors of residuals that are zero.
    """

    svd: Svd = "randomized"
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """The weights [n, m] of a linear layer at the depths that run one block.

    Attributes:
        name: of the layer within a layer of the model.
        depths: numbers of the depths.
        inputs: the weights of the depths, where residuals are asked for; behind them those that
            the block starts from, where they are other layers'.
        starts: places in `inputs` of those whose mean the tied weight is.
        gains: one vector [m] for each input, folded into the weight's columns; or none.
    """

    name: str
    depths: tuple[int, ...]
    inputs: tuple[TensorInfo, ...]
    starts: tuple[int, ...]
    gains: tuple[TensorInfo, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.inputs[0].shape[0], self.inputs[0].shape[1]

    @property
    def spec(self) -> TensorSpec:
        """What a weight is stored as."""
        return TensorSpec(self.inputs[0].dtype, self.shape)

    @property
    def width(self) -> int:
        """Bytes of the floats that the engine gives."""
        return 8 if self.spec.dtype in {"F32", "F64"} else 4

    def rows(self, stored: Sequence[Any], slot: int) -> Iterator[tuple[slice, "Tensor"]]:
        """Yield the weight of a depth in blocks of rows, its gain folded in."""
        gain = stored[len(self.inputs) + slot][...] if self.gains else None
        for rows in bands(self.shape):
            found = stored[slot][rows]
            yield rows, found if gain is None else found * gain


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a step over a module writes; places are those of the module's depths.

    Attributes:
        tied: the name of the tied weight.
        ranks: of each depth's factors; 0 for none.
        factors: names by place.
        dense: names by place of tied weights with the factors added.
    """

    ranks: tuple[int, ...]
    tied: str | None = None
    factors: Mapping[int, Names] = field(default_factory=dict)
    dense: Mapping[int, str] = field(default_factory=dict)


def bands(shape: tuple[int, int]) -> Iterator[slice]:
    """Yield runs of rows that are read at once."""
    step = max(BLOCK // max(shape[1], 1), 1)
    yield from (slice(at, min(at + step, shape[0])) for at in range(0, shape[0], step))


def block_step(module: Module, wanted: Wanted, how: How) -> Step:
    """Return the step that ties one linear layer of a block.

    The residual of each depth is taken against the tied weight as it is stored, rounded; one is
    held at a time.
    """

    def fn(*stored: Any) -> Iterator[Any]:  # noqa: ANN401 - `Stored` tensors
        held = tied_weight(module, stored)
        if wanted.tied:
            yield from (held[rows] for rows in bands(module.shape))
        told: dict[str, float] = {}
        for slot, rank in enumerate(wanted.ranks):
            if rank:
                left = residual(module, stored, held, slot, how.device)
                seed = f"{how.seed}\0{module.depths[slot]}\0{module.name}"
                found = factorise(left, rank, method=how.svd, seed=seed)
                told[f"kept {slot}"], told[f"whole {slot}"] = found.kept, found.whole
                yield from _depth(module, left, held, found, apart=slot in wanted.factors)
            elif slot in wanted.dense:
                yield from (held[rows] for rows in bands(module.shape))
        if any(wanted.ranks):
            yield Tell(**_summed(module, told))

    return Step(
        outputs=tuple(_outputs(module, wanted)),
        inputs=(*module.inputs, *module.gains),
        fn=fn,
        streamed=True,
        scratch=_scratch(module, wanted, how),
        why="relax" if any(wanted.ranks) else "tie",
        key=repr((module.starts, wanted.ranks, how.svd, how.device, how.seed)),
        tells=_figures(module, wanted) if any(wanted.ranks) else (),
    )


def tied_weight(module: Module, stored: Sequence[Any]) -> "Tensor":
    """Return the mean of the weights that the block starts from, [n, m], as it is stored."""
    import torch

    held = torch.empty(module.shape, dtype=torch_dtype(module.spec.dtype))
    blocks = [module.rows(stored, slot) for slot in module.starts]
    for parts in zip(*blocks, strict=True):
        total = parts[0][1]
        for _, more in parts[1:]:
            total = total + more
        held[parts[0][0]] = total / len(parts)
    return held


def residual(
    module: Module, stored: Sequence[Any], held: "Tensor", slot: int, device: str
) -> "Tensor":
    """Return what a depth's weight is beyond the tied one, [n, m], on the device."""
    import torch

    dtype = torch.float64 if module.width == 8 else torch.float32  # noqa: PLR2004 - bytes
    found = torch.empty(module.shape, dtype=dtype, device=device)
    for rows, own in module.rows(stored, slot):
        found[rows] = (own - held[rows]).to(dtype)
    return found


def merged(base: Any, b: "Tensor", a: "Tensor", shape: tuple[int, int]) -> Iterator["Tensor"]:  # noqa: ANN401
    """Yield base + b @ a in blocks of rows; `base` is indexed by rows.

    Shapes: base [n, m], b [n, r], a [r, m]; both factors as they are stored, widened.
    """
    for rows in bands(shape):
        yield base[rows].to(a.dtype) + b[rows] @ a


def _depth(
    module: Module, left: "Tensor", held: "Tensor", found: Factors, *, apart: bool
) -> Iterator["Tensor"]:
    """Yield what one depth adds: its factors, or its weight with their product as stored."""
    a, b = (factor.cpu() for factor in (found.a, found.b))
    if apart:
        yield from (a, b)
        return
    a, b = (factor.to(held.dtype).to(left.dtype) for factor in (a, b))
    yield from merged(held, b, a, module.shape)


def _summed(module: Module, told: Mapping[str, float]) -> dict[str, float]:
    """Return the share of the squared residuals that the factors keep, in all and by depth."""
    kept = [(slot, told.get(f"kept {slot}")) for slot in range(len(module.depths))]
    shares = {
        f"_energy_{module.depths[slot]}": _share(own, told[f"whole {slot}"])
        for slot, own in kept
        if own is not None
    }
    whole = sum(value for name, value in told.items() if name.startswith("whole"))
    return {"energy": _share(sum(own or 0.0 for _, own in kept), whole), "_change": whole} | shares


def _share(kept: float, whole: float) -> float:
    return kept / whole if whole else 1.0


def _figures(module: Module, wanted: Wanted) -> tuple[str, ...]:
    depths = (d for d, rank in zip(module.depths, wanted.ranks, strict=True) if rank)
    return ("energy", "_change", *(f"_energy_{depth}" for depth in depths))


def _outputs(module: Module, wanted: Wanted) -> Iterator[tuple[str, TensorSpec]]:
    spec, (n, m) = module.spec, module.shape
    if wanted.tied:
        yield wanted.tied, spec
    for slot, rank in enumerate(wanted.ranks):
        if slot in wanted.dense:
            yield wanted.dense[slot], spec
        elif slot in wanted.factors:
            a, b = wanted.factors[slot]
            yield a, TensorSpec(spec.dtype, (rank, m))
            yield b, TensorSpec(spec.dtype, (n, rank))


def _scratch(module: Module, wanted: Wanted, how: How) -> int:
    n, m = module.shape
    item = BITS[module.spec.dtype] // 8
    rank = max(wanted.ranks, default=0)
    need = item * n * m + 4 * module.width * max(BLOCK, m)
    if rank:
        need += module.width * (n * m + 2 * (n + m) * rank)
        need += scratch(module.shape, rank, how.svd, module.width)
    return need
